"""What was built, as an engine: of this machine, or of one that has the provider."""

from __future__ import annotations

from moeopt.backends.onnxrt.build import BuiltGraph
from moeopt.backends.onnxrt.engine import OnnxEngine
from moeopt.backends.onnxrt.missing_kernels import missing_kernel
from moeopt.backends.onnxrt.offline_engine import OfflineEngine
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.replay import ReplayPlan
from moeopt.backends.onnxrt.session import GRAPH
from moeopt.errors import MoeoptError, NotSaveableError
from moeopt.value_types import JsonValue


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
        if why := missing_kernel(str(err), built.float64, f"ONNX Runtime {runtime().__version__} on {plan.provider}"):
            raise NotSaveableError(why) from err
        raise NotSaveableError(
            f"ONNX Runtime {runtime().__version__} does not load the graph that was written for {plan.provider}: "
            f"{str(err).strip().splitlines()[0][:300]}; use backend='torch', or report this with the model's code"
        ) from err
