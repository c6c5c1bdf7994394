"""What each method of rounding loses on the two trained models of the tests: ``python -m benchmarks.quantise_methods``.

Mean KL and top-1 agreement on 1536 characters of docstrings that neither training nor calibration saw; ``gptq`` is
calibrated on 32 sequences of 96 characters of the training text, three draws, of which the mean, the least and the most
are told. Give a file's name to save the figures there, or ``seconds`` to time the methods on matrices instead, or
``products`` and a file's name: attention and ``lm_head`` in int4 in engines, the experts floats or in int4 as well.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import moeopt
from examples.train_tiny_lm import docstrings, encode
from moeopt.ir.weight_format import INT4_BLOCK32
from moeopt.ops.gptq import gptq
from moeopt.ops.quantize import quantize
from moeopt.options.quant_plan import METHODS
from tests.trained_lm import KINDS, load, text

FORMATS = ("int4", "int4-block128", "int4-asymmetric32", "mxfp4", "int8")
LENGTH, SEQUENCES, DRAWS = 96, 32, 3


def calibration(seed: int, sequences: int = SEQUENCES) -> dict[str, Tensor]:
    """Sequences of the text that the models were trained on."""
    ids = encode("\n\n".join(docstrings(held_out=False)))
    starts = torch.randint(0, len(ids) - LENGTH, (sequences,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": torch.stack([ids[at : at + LENGTH] for at in starts.tolist()])}


def losses(kind: str, format: str, method: str) -> list[tuple[float, float]]:
    """(mean KL, top-1) of one model, for each draw of the calibration that the method needs."""
    found = []
    fields = {"dense": "split", "experts": 4} if kind == "dense" else {}
    for seed in range(DRAWS if method == "gptq" else 1):
        opt = moeopt.optimize(
            load(kind), {"input_ids": text(4)}, quantize=moeopt.QuantPlan(default=format, method=method),
            calibration=calibration(seed) if method == "gptq" else None, data={"input_ids": text()}, verify="fast",
            **fields,
        )  # fmt: skip
        assert opt.certificate.passed is True, opt.certificate
        found.append((opt.certificate.loss["kl_mean"], opt.certificate.loss["top1"]))
    return found


def seconds() -> None:
    """CPU seconds a million weights, one thread, of which ``gptq`` has the Hessian already."""
    for rows, columns in ((7168, 1024), (1024, 3584)):
        w, x = torch.randn(rows, columns), torch.randn(1000, columns).double()
        hessian = x.T @ x
        for method in METHODS:
            started = time.process_time()
            if method == "gptq":
                gptq(w, INT4_BLOCK32, hessian)
            else:
                quantize(w, INT4_BLOCK32, search=method == "search")
            taken = time.process_time() - started
            print(f"{rows} x {columns} {method}: {1e6 * taken / w.numel():.3f} s a million weights")


def products(out: str) -> None:
    """Mean KL of engines of the MoE model whose products outside of experts are codes."""
    table: dict[str, dict[str, list[float]]] = {}
    for experts in ("float", "int4"):
        for method in METHODS:
            for seed in range(DRAWS if method == "gptq" else 1):
                opt = moeopt.optimize(
                    load("moe"), {"input_ids": text(4)}, backend="onnxruntime", data={"input_ids": text()},
                    quantize=moeopt.QuantPlan(default=experts, products={"*": "int4"}, method=method),
                    calibration=calibration(seed) if method == "gptq" else None, verify="fast",
                )  # fmt: skip
                assert opt.certificate.passed is True, opt.certificate
                kl = float(f"{opt.certificate.loss['kl_mean']:.3g}")
                table.setdefault(f"experts {experts}", {}).setdefault(method, []).append(kl)
                print(experts, method, kl, flush=True)
    command = "python -m benchmarks.quantise_methods products " + out
    body = {"command": command, "torch": torch.__version__, "moeopt": moeopt.__version__, "kl_mean": table}
    Path(out).write_text(json.dumps(body, indent=1) + "\n")


def main(out: str = "", file: str = "") -> None:
    torch.set_num_threads(1)
    if out == "products":
        products(file)
        return
    if out == "seconds":
        seconds()
        return
    table: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for kind in KINDS:
        for format in FORMATS:
            for method in METHODS:
                kl, top1 = zip(*losses(kind, format, method), strict=True)
                row = {
                    "kl_mean": sum(kl) / len(kl), "least": min(kl), "most": max(kl), "top1": sum(top1) / len(top1)
                }  # fmt: skip
                table.setdefault(kind, {}).setdefault(format, {})[method] = {
                    k: float(f"{v:.3g}") for k, v in row.items()
                }
                print(kind, format, method, row, flush=True)
    if out:
        command = "python -m benchmarks.quantise_methods " + out
        body = {"command": command, "torch": torch.__version__, "moeopt": moeopt.__version__, "losses": table}
        Path(out).write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
