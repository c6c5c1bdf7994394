"""What was built, as an engine: of this machine, or of one that has the provider."""

from __future__ import annotations

from pathlib import Path

from moeopt.backends.onnxrt.build import BuiltGraph
from moeopt.backends.onnxrt.engine import OnnxEngine
from moeopt.backends.onnxrt.missing_kernels import missing_kernel
from moeopt.backends.onnxrt.offline_engine import OfflineEngine
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.replay import ReplayPlan
from moeopt.backends.onnxrt.session import GRAPH, mapped_options
from moeopt.errors import MoeoptError, NotEquivalentError, NotSaveableError
from moeopt.options import Options
from moeopt.untrusted import shown_line
from moeopt.value_types import JsonValue, OrtObject


def chosen_options(mapped: bool, given: JsonValue) -> OrtObject:
    """The options of a new engine's session: the user's own, or None; with ``mapped`` as :func:`mapped_options`."""
    return mapped_options(given) if mapped else given


def opened_file(built: BuiltGraph, options: Options, graph: str) -> OnnxEngine:
    """The engine of an ONNX file's new graph, on this machine's CPU.

    Raises:
        NotEquivalentError: ONNX Runtime, which took the file, does not load the new graph.
    """
    how = chosen_options(options.mapped, options.session_options)
    try:
        return OnnxEngine(built.directory, built.signature, "cpu", how, built.folder, graph=graph)
    except MoeoptError:
        raise
    except Exception as err:  # ONNX Runtime's own, of many classes
        raise NotEquivalentError(
            f"ONNX Runtime {runtime().__version__} does not load the new graph, and it was not kept: "
            f"{shown_line(err)[:300]}; use the file as it is, and report this with the file"
        ) from err


def open_onnx(
    built: BuiltGraph, plan: OrtPlan, session_options: JsonValue, graph: str = GRAPH
) -> OnnxEngine | OfflineEngine:
    """What ``build_onnx`` wrote, as an engine of this machine, or of one that has the plan's provider.

    ``graph``: the file that runs, where it runs here.
    """
    if isinstance(plan, ReplayPlan):
        return OfflineEngine(built.directory, built.signature, plan.target.provider, built.folder)
    try:
        return OnnxEngine(
            built.directory, built.signature, plan.provider, session_options, keep=built.folder, graph=graph
        )
    except MoeoptError:
        raise
    except Exception as err:  # ONNX Runtime's own, of many classes
        if held := _float8(built.directory):
            raise NotSaveableError(
                f"the model's own code reads 8-bit floats with {', '.join(held)}, for which ONNX Runtime "
                f"{runtime().__version__} has no kernel: experts that are rewritten read such codes as they lie, and "
                "moeopt.explain says why others are not. Hold the codes as int8, make them floats once with .float(), "
                "or use backend='torch'"
            ) from err
        if why := missing_kernel(str(err), built.float64, f"ONNX Runtime {runtime().__version__} on {plan.provider}"):
            raise NotSaveableError(why) from err
        raise NotSaveableError(
            f"ONNX Runtime {runtime().__version__} does not load the graph that was written for {plan.provider}: "
            f"{str(err).strip().splitlines()[0][:300]}; use backend='torch', or report this with the model's code"
        ) from err


def _float8(directory: Path) -> list[str]:
    """The ops of a graph, but for casts, that read weights of 8-bit floats."""
    import onnx

    model = onnx.load(directory / GRAPH, load_external_data=False)
    kinds = [k for k in onnx.TensorProto.DataType.values() if onnx.TensorProto.DataType.Name(k).startswith("FLOAT8")]
    held = {w.name for w in model.graph.initializer if w.data_type in kinds}
    return sorted({n.op_type for n in model.graph.node if held & set(n.input) and n.op_type != "Cast"})
