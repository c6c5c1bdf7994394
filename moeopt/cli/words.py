"""The arguments and options that several commands take, as typer reads them."""

from pathlib import Path
from typing import Annotated

import typer

from moeopt.checkpoint.tasks import TASKS
from moeopt.cli.target import FORMS

TargetArgument = Annotated[str, typer.Argument(help=FORMS)]
BundleArgument = Annotated[Path, typer.Argument(help="a bundle that `moeopt optimize --out` wrote")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout, and nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run the Python code that a Hugging Face directory brings")
]
Html = Annotated[Path | None, typer.Option(help="write the report to this file as one HTML page")]
Task = Annotated[str | None, typer.Option(help="what a Hugging Face model is loaded for: " + ", ".join(TASKS))]
RunsOn = Annotated[
    str | None, typer.Option(help="where it shall run, like cpu or cuda:0; without it, where the model's weights are")
]
CastTo = Annotated[
    str | None, typer.Option(help="cast the model first, like bfloat16; without it, the model keeps its own")
]
Tune = Annotated[
    bool, typer.Option("--tune", help="choose each block's form by measuring it on this machine, not by estimate")
]
BuiltFor = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="what an engine is built for: a provider of ONNX Runtime, like cuda, or sm_89 for tensorrt; "
        "without it, --device",
    ),
]
QuantizeTo = Annotated[str | None, typer.Option(help="round the experts' weights: int8, int4, fp8 or mxfp4")]
QuantizeMethod = Annotated[
    str | None, typer.Option(help="how they are rounded: nearest, search, or gptq, which needs --calibration")
]
Calibration = Annotated[
    str | None,
    typer.Option(help="what --quantize-method weighs by: module:function or file.py:function that returns calls"),
]
QuantizeProducts = Annotated[
    list[str] | None,
    typer.Option(
        help="the same for products outside of MoE blocks, of an engine: int8 for all of them, or lm_head=int8; "
        "may be given again"
    ),
]
Activations = Annotated[
    str | None, typer.Option(help="what products of codes read: float, or int8, which is faster and another loss")
]
LimitTo = Annotated[
    list[str] | None,
    typer.Option(
        help="the most that quantising may lose, and exit code 1 where it lost more: kl_mean=0.01, top1=0.97 (at "
        "least), error_mean=0.02, ...; may be given again"
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="let a bundle that was not verified, or did not pass, replace one that passed"),
]
BackendName = Annotated[
    str | None,
    typer.Option(
        help="torch, onnxruntime, tensorrt, or one that an installed package brings; without it torch, and for an "
        "ONNX file onnxruntime"
    ),
]
VerifyLevel = Annotated[
    str | None, typer.Option(help="strict (what runs without it), fast (fewer cases) or off (the certificate says so)")
]
Seed = Annotated[int, typer.Option(help="of every random input, and of random weights")]
