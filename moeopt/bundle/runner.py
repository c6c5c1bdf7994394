"""Run a bundle's graph: one list of calls, each value dropped after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch

from moeopt.bundle import op_allowlist as allow
from moeopt.bundle import values
from moeopt.bundle.binding import Binding
from moeopt.bundle.expert_tensors import takes_experts, tensors_by_expert
from moeopt.bundle.graph import SCHEMA
from moeopt.bundle.memory import Meter, hangs_on_values, tensors_of
from moeopt.bundle.schemas import GraphFile
from moeopt.bundle.tree import build, check_tree
from moeopt.errors import BundleError, LimitError, UsageError
from moeopt.ir.bank_format import BankFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.limits import DEFAULT, LoadLimits, TimeLimit
from moeopt.ops.fixed_experts import FixedExperts, FixedQuantizedExperts
from moeopt.untrusted import shown
from moeopt.value_types import FxArg, FxTarget, PyObject

ReadyExperts = FixedExperts | FixedQuantizedExperts
_READY: dict[FxTarget, Callable[..., ReadyExperts]] = {
    torch.ops.moeopt.experts.default: FixedExperts,
    torch.ops.moeopt.quantized_experts.default: FixedQuantizedExperts,
}
REMEMBERED = 256
"""Sets of sizes that a runner remembers as measured."""
_KINDS: dict[str, type] = {"ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format}
"""Parameters for which ops take any integer, and believe it."""


class ValueRef:
    """Where a literal's place is taken by a value computed earlier."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class OpCall:
    """One call: the op, what is called for it, with what, where the result goes, and what is not needed after it.

    ``op`` is None for arithmetic on numbers, which takes no memory. ``ready`` is what is called with the first three
    arguments in the place of all, where the others are weights; None where there is none.
    """

    __slots__ = ("op", "function", "args", "kwargs", "out", "drop", "fixed", "ready")

    def __init__(
        self, op: FxTarget, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], out: str
    ) -> None:
        self.op, self.function, self.args, self.kwargs, self.out = op, function, args, kwargs, out
        self.drop: tuple[str, ...] = ()
        self.fixed = not _refs(kwargs)
        self.ready: ReadyExperts | None = None


class GraphRunner:
    """A graph that was read and checked, with its weights; call it as the model was called.

    ``BundleError`` at construction for a graph that :func:`moeopt.bundle.graph.write_graph` would not have written;
    ``UsageError`` at a call whose arguments do not fit; ``BundleError`` at a call where an op stops, or asks for more
    memory than ``limits`` allow. ``files``: the bytes of the bundle's files.
    """

    def __init__(
        self,
        graph: Mapping[str, Any],
        weight: Callable[[str], torch.Tensor],
        device: Callable[[str], torch.device] = torch.device,
        limits: LoadLimits = DEFAULT,
        files: int = 0,
    ) -> None:
        self.limits, self.files = limits, files
        self.time: TimeLimit | None = None
        self.before_experts: Callable[[int, torch.Tensor], None] | None = None
        self.experts: dict[str, int] = {}
        self._measured: set[Any] = set()
        try:
            self._read(graph, weight, device)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as err:
            if isinstance(err, UsageError):
                raise BundleError(shown(err, 500)) from None
            raise BundleError(f"the graph lacks or mistypes a part ({type(err).__name__}: {shown(err, 200)})") from None

    def _read(self, graph: Mapping[str, Any], weight: PyObject, device: PyObject) -> None:
        if graph["schema"] != SCHEMA:
            raise BundleError(f"the graph has schema {graph['schema']!r:.60}, and this moeopt reads {SCHEMA}")
        for key in GraphFile.__struct_fields__:
            graph[key]  # a KeyError names what is not there
        try:
            msgspec.convert(graph, GraphFile)
        except msgspec.ValidationError as err:
            raise TypeError(str(err)) from None
        self.binding, self.out_tree = Binding(graph, device), graph["out_tree"]
        if check_tree(self.out_tree) != len(graph["outputs"]):
            raise BundleError("the structure of the result does not fit the graph")
        self.weights = {str(name): weight(key) for name, key in graph["weights"].items()}
        known = {i["name"] for i in self.binding.inputs} | set(self.weights)

        def ref(name: str) -> ValueRef:
            if name not in known:
                raise BundleError(f"{name!r} is read before it is computed")
            return ValueRef(name)

        self.steps: list[OpCall] = []
        for node in graph["nodes"]:
            step = self._step(node, ref, device)
            if step.out in known:
                raise BundleError(f"{step.out!r} is computed twice")
            known.add(step.out)
            self.steps.append(step)
        self.outputs = [values.decode(v, ref, device) for v in graph["outputs"]]
        self.write_back = [(ref(w["from"]).name, ref(w["into"]).name) for w in graph["write_back"]]
        self._steady = not any(s.op is not None and hangs_on_values(s.op, s.args) for s in self.steps)
        self._plan_drops()
        written = {into for _, into in self.write_back}
        for step in self.steps:
            step.ready = self._ready(step, written)

    def _ready(self, step: OpCall, written: set[str]) -> ReadyExperts | None:
        """The experts of a call whose weights are all in the file, and stay what they are."""
        ready = _READY.get(step.op)
        if ready is None or len(step.args) != len(step.op._schema.arguments) or step.kwargs:
            return None
        named = _refs(step.args[3:8])
        if any(ref.name not in self.weights or ref.name in written for ref in named):
            return None
        if not all(isinstance(ref, ValueRef) for ref in step.args[:3]):
            return None
        try:
            return ready([part or [] for part in _fill(step.args[3:8], self.weights)], *step.args[8:])
        except Exception:  # a list that is no bank: the op says so at the call, as of any other
            return None

    def expert_layers(self) -> list[list[list[torch.Tensor]]]:
        """Of each call of an experts' op that reads weights as they are in the file: by expert, its matrices. Numbers
        those calls in :attr:`experts`."""
        layers: list[list[list[torch.Tensor]]] = []
        written = {into for _, into in self.write_back}
        for step in self.expert_calls:
            named = _refs(step.args[3:])
            if step.kwargs or any(ref.name not in self.weights or ref.name in written for ref in named):
                continue
            found = tensors_by_expert(step.op, _fill(step.args[3:], self.weights))
            if found is not None:
                self.experts[step.out] = len(layers)
                layers.append(found)
        return layers

    @property
    def expert_calls(self) -> list[OpCall]:
        """Every call of an experts' op."""
        return [step for step in self.steps if takes_experts(step.op)]

    @staticmethod
    def _step(node: FxArg, ref: PyObject, device: PyObject) -> OpCall:
        function, op = allow.guarded(node["op"]), allow.op_named(node["op"])
        args = values.decode(node["args"], ref, device)
        kwargs = {str(k): values.decode(v, ref, device) for k, v in node.get("kwargs", {}).items()}
        if op is not None:
            _check_kinds(op, args, kwargs)
            _check_texts(op, args, kwargs)
        return OpCall(op, function, args, kwargs, str(node["out"]))

    def _plan_drops(self) -> None:
        kept = {r.name for r in _refs(self.outputs)} | {n for pair in self.write_back for n in pair} | set(self.weights)
        for step in reversed(self.steps):
            last = {r.name for r in _refs([step.args, step.kwargs])} | {step.out}
            step.drop = tuple(sorted(last - kept))
            kept |= last

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        env: dict[str, Any] = dict(self.weights)
        inputs = self.binding.bind(args, kwargs)
        env.update(inputs)
        meter, key = self._meter(inputs)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            for step in self.steps:
                try:
                    self._run(step, env, meter)
                except torch.OutOfMemoryError:
                    raise
                except LimitError as err:
                    raise LimitError(_stopped(step, err)) from None
                except Exception as err:  # whatever an op raises
                    raise BundleError(_stopped(step, err)) from err
            try:
                for source, into in self.write_back:
                    env[into].copy_(env[source])
            except (RuntimeError, AttributeError) as err:
                raise BundleError(f"the graph writes {into!r:.60} back, which stopped: {shown(err, 200)}") from err
        if key is not None and len(self._measured) < REMEMBERED:
            self._measured.add(key)
        return build(self.out_tree, iter(_fill(self.outputs, env)))

    def _run(self, step: OpCall, env: dict[str, Any], meter: Meter | None) -> None:
        if meter is None and step.ready is not None:
            self._run_ready(step, step.ready, env)
            return
        args = [env[a.name] if type(a) is ValueRef else _fill(a, env) if type(a) is list else a for a in step.args]
        kwargs = step.kwargs if step.fixed else _fill(step.kwargs, env)
        if meter is not None:
            if self.time is not None and self.time.over:
                raise LimitError(f"it takes longer than {self.time.seconds:.3g} s: {_LONGER}")
            if step.op is not None:
                if (check := getattr(step.function, "check", None)) is not None:
                    check(*args, **kwargs)  # asking an op for its sizes calls it too
                meter.check(step.op, args, kwargs)
        if self.before_experts is not None and step.out in self.experts:
            self.before_experts(self.experts[step.out], args[1])
        env[step.out] = result = step.function(*args, **kwargs)
        if meter is not None:
            meter.add(result)
        for name in step.drop:
            gone = env.pop(name)
            if meter is not None:
                meter.drop(gone)

    def _run_ready(self, step: OpCall, ready: ReadyExperts, env: dict[str, Any]) -> None:
        x, ids, weights = (env[a.name] for a in step.args[:3])
        if self.before_experts is not None and step.out in self.experts:
            self.before_experts(self.experts[step.out], ids)
        env[step.out] = ready(x, ids, weights)
        for name in step.drop:
            del env[name]

    def _meter(self, inputs: dict[str, Any]) -> tuple[Meter | None, Any]:
        """What measures this call, None where a call of these sizes was measured; and the key of the sizes."""
        key = None
        if self._steady and self.time is None:
            key = tuple(tuple(v.shape) if isinstance(v, torch.Tensor) else repr(v) for v in inputs.values())
            if key in self._measured:
                return None, None
        given = sum(t.numel() * t.element_size() for t in tensors_of(list(inputs.values())))
        return Meter(self.limits.bytes_for(self.files, given), [self.weights, inputs]), key


_LONGER = "if you trust the bundle, give it longer: limits=moeopt.LoadLimits(seconds=...), or `moeopt verify --seconds`"


_NAMES_NOTHING = (
    "an index of this call (an id, a position) is outside the table that it is looked up in, or outside the range of "
    "expert ids that was verified: compare with the example inputs, or run the original model on this call"
)


def _stopped(step: OpCall, err: BaseException) -> str:
    """What stopped, where and why."""
    what = step.op if step.op is not None else getattr(step.function, "__name__", step.function)
    why = f"; {_NAMES_NOTHING}" if isinstance(err, IndexError) else ""
    return f"the graph stops at {shown(step.out, 60)!r} ({what}): {shown(err, 500)}{why}"


def _check_kinds(op: FxTarget, args: list[Any], kwargs: dict[str, Any]) -> None:
    """``BundleError`` for an integer in the place of a dtype, a layout or a memory format."""
    for at, parameter in enumerate(op._schema.arguments):
        kind = _KINDS.get(str(parameter.real_type).removeprefix("Optional[").removesuffix("]"))
        value = kwargs.get(parameter.name) if at >= len(args) else args[at]
        if kind is not None and value is not None and not isinstance(value, kind):
            raise BundleError(f"{op} is given {value!r:.60} for {parameter.name}, which is no {kind.__name__}")


_TEXTS = {"spec": ExpertsSpec.decode, "formats": BankFormat.decode}
"""What reads the words that moeopt's own ops take."""


def _check_texts(op: FxTarget, args: list[Any], kwargs: dict[str, Any]) -> None:
    """``UsageError`` for a spec, or formats, that no op of moeopt takes: told when a graph is read."""
    for at, parameter in enumerate(op._schema.arguments):
        if op.namespace == "moeopt" and parameter.name in _TEXTS:
            text = kwargs.get(parameter.name, "") if at >= len(args) else args[at]
            _TEXTS[parameter.name](text if isinstance(text, str) else "")


def _refs(value: PyObject) -> list[ValueRef]:
    if isinstance(value, ValueRef):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [r for v in value for r in _refs(v)] if isinstance(value, list) else []


def _fill(value: PyObject, env: dict[str, Any]) -> PyObject:
    kind = type(value)
    if kind is ValueRef:
        return env[value.name]
    if kind is list:
        return [_fill(v, env) for v in value]
    if kind is dict:
        return {k: _fill(v, env) for k, v in value.items()}
    return value
