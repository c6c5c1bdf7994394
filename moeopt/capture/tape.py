"""A trace: run a module once on real tensors and keep every ATen call as an fx graph.

``record(module, args, kwargs)`` runs the module as it is, loops and ``.tolist()`` included, under
``torch.no_grad()``, and returns a :class:`Tape`: ATen calls as fx nodes in functional (SSA) form, the
concrete value of every node, the module calls that the nodes belong to, and the user's source lines.
In-place calls are recorded as their functional twins; a later read of any alias sees the new value.
The module is left exactly as it was: buffers, attributes, hooks, RNG and the training flag.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.functional import functional_twin, inverse_view, mutated_args, unsaid_writes
from moeopt.capture.module_state import ModuleState
from moeopt.capture.nodes import NodeFactory
from moeopt.capture.tree import leaves_of, tree_map
from moeopt.errors import CaptureError
from moeopt.patches import module_calls

aten = torch.ops.aten
Steer = Callable[[Any, tuple[Any, ...], Any], Any]


@dataclass(eq=False)
class Call:
    """One call of a submodule: which nodes it recorded, and what went in and came out."""

    index: int
    path: str
    module: nn.Module
    parent: int | None
    first: int
    last: int = -1
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


class Read(NamedTuple):
    """A value that left the tape as a Python number or an array: its node, the user's line, the call it was in."""

    node: fx.Node
    line: str
    call: int


@dataclass
class Tape:
    """The record of one run. ``args``/``output`` hold fx nodes where the run had tensors."""

    root: nn.Module
    calls: list[Call]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    concrete_output: Any
    mutations: dict[fx.Node, fx.Node]
    attributes: dict[tuple[str, str], Any]
    in_place: set[tuple[str, str]]
    reads: list[Read]
    nodes: list[fx.Node]
    _values: dict[fx.Node, Any]

    def value(self, node: fx.Node) -> Any:
        """What ``node`` held when it was recorded (recomputed where a later write destroyed it)."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._values:
                stack.pop()
                continue
            missing = [n for n in top.all_input_nodes if n not in self._values]
            if missing:
                stack.extend(missing)
                continue
            args, kwargs = fx.map_arg((top.args, top.kwargs), self._values.__getitem__)
            self._values[top] = top.target(*args, **kwargs)  # type: ignore[operator]
            stack.pop()
        return self._values[node]

    def call_of(self, node: fx.Node) -> Call:
        """The innermost module call that recorded ``node``."""
        return self.calls[node.meta["call"]]

    def stack(self, index: int | None) -> list[int]:
        """Call indices from the root's call down to ``index``."""
        chain: list[int] = []
        while index is not None:
            chain.append(index)
            index = self.calls[index].parent
        return chain[::-1]

    def results(self) -> list[fx.Node]:
        """Every node that outlives the call: outputs, writes to inputs and buffers, stored attributes."""
        return leaves_of(fx.Node, [self.output, list(self.mutations.values()), list(self.attributes.values())])

    def write_origin(self, node: fx.Node) -> fx.Node | None:
        """For the result of an in-place call: the node that first owned the memory it wrote to."""
        return node.meta.get("origin")

    def random_nodes(self) -> list[fx.Node]:
        """Nodes that drew random numbers."""
        return [n for n in self.nodes if n.meta.get("random")]


@dataclass
class _Storage:
    owner: fx.Node
    origin: fx.Node
    version: int = 0


@dataclass
class _Entry:
    ref: Callable[[], torch.Tensor | None]
    node: fx.Node
    version: int
    parent: torch.Tensor | None = None
    view: tuple[Any, tuple[Any, ...], dict[str, Any], int | None] | None = None


_WRAPPED = object()
_NOT_RUN = object()
_VIEW_TWINS = {
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
}


def _storage_key(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    """Writes each ATen call down as a node; see :func:`record`."""

    def __init__(
        self, root: nn.Module, state: ModuleState, keep_values: bool, steer: Steer | None, lenient: bool
    ) -> None:
        super().__init__()
        self.steer, self.lenient = steer, lenient
        self._ran: Any = _NOT_RUN
        self.root, self.state, self.keep_values = root, state, keep_values
        self.make = NodeFactory()
        self.nodes: list[fx.Node] = []
        self.values: dict[fx.Node, Any] = {}
        self.calls: list[Call] = []
        self.current: int | None = None
        self.mutations: dict[fx.Node, fx.Node] = {}
        self.reads: list[Read] = []
        self._entries: dict[int, _Entry] = {}
        self._storages: dict[int, _Storage] = {}
        self._views: dict[int, list[_Entry]] = {}
        self._alive: list[torch.Tensor] = []
        self._paths = {id(m): name for name, m in state.modules}
        self._attributes: dict[int, str] = {}
        for name, tensor in (*state.parameters, *state.buffers):
            self._attributes.setdefault(id(tensor), name)
        for path, module in state.modules:
            for name, value in module.__dict__.items():
                if isinstance(value, torch.Tensor):
                    self._attributes.setdefault(id(value), f"{path}.{name}" if path else name)
        self._by_storage: dict[int, torch.Tensor] = {}
        for _, tensor in (*state.parameters, *state.buffers):
            if tensor.layout == torch.strided and tensor.device.type != "meta":
                self._by_storage.setdefault(_storage_key(tensor), tensor)
        self._pause = 0

    # -- nodes and entries ---------------------------------------------------------------------

    def _finish(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["call"] = self.current if self.current is not None else 0
        node.meta["index"] = len(self.nodes)
        if isinstance(value, torch.Tensor):
            node.meta["shape"] = tuple(value.shape)
            node.meta["dtype"] = value.dtype
        self.nodes.append(node)
        if self.keep_values:
            self.values[node] = value
        return node

    def _enter(self, t: torch.Tensor, node: fx.Node, **extra: Any) -> fx.Node:
        key = _storage_key(t)
        if extra.get("view") is None:
            storage = self._storages[key] = _Storage(node, node)
        else:
            storage = self._storages[key]
        ref: Callable[[], torch.Tensor | None] = weakref.ref(t)
        entry = self._entries[id(t)] = _Entry(ref, node, storage.version, **extra)
        if extra.get("view") is None:
            self._views[key] = [entry]
        else:
            self._views[key].append(entry)
        if self.keep_values:
            self._alive.append(t)
        return node

    def add_input(self, t: torch.Tensor, name: str) -> fx.Node:
        """A placeholder for a tensor that the caller passed in."""
        node = self.make.placeholder(name)
        known = self._storages.get(_storage_key(t))
        self._finish(node, t)
        if known is not None:
            raise CaptureError(f"two inputs share memory ({known.owner} and {name}); pass a copy of one of them")
        return self._enter(t, node)

    def node_of(self, t: torch.Tensor) -> fx.Node:
        """The node that holds the current value of ``t``."""
        entry = self._entries.get(id(t))
        if entry is None or entry.ref() is not t:
            return self._new_leaf(t)
        storage = self._storages[_storage_key(t)]
        if entry.version == storage.version:
            return entry.node
        if entry.view is None:
            entry.node = storage.owner
        else:
            func, args, kwargs, item = entry.view
            assert entry.parent is not None
            base = self.node_of(entry.parent)
            node = self._finish(self.make.call(func, (base, *args), kwargs), None)
            self.values.pop(node, None)
            if item is not None:
                node = self._finish(self.make.call(operator.getitem, (node, item)), None)
                self.values.pop(node, None)
            node.meta.update(shape=tuple(t.shape), dtype=t.dtype)
            entry.node = node
        entry.version = storage.version
        return entry.node

    def _new_leaf(self, t: torch.Tensor) -> fx.Node:
        name = self._attributes.get(id(t))
        if name is not None:
            node = self.make.attribute(name)
            return self._enter(t, self._finish(node, t))
        base = self._by_storage.get(_storage_key(t)) if t.layout == torch.strided else None
        if base is not None and base is not t:  # a .data or detached alias of a parameter
            parent = self.node_of(base)
            geometry = (list(t.shape), list(t.stride()), t.storage_offset())
            node = self._finish(self.make.call(aten.as_strided.default, (parent, *geometry)), t)
            return self._enter(t, node, parent=base, view=(aten.as_strided.default, geometry, {}, None))
        node = self.make.attribute(f"_constant_{len(self.nodes)}")
        node.meta["constant"] = t.detach().clone()
        self._finish(node, t)
        known = self._storages.get(_storage_key(t))
        if known is not None:  # an unseen alias of a recorded tensor: only its value is known
            entry = self._entries[id(t)] = _Entry(weakref.ref(t), node, known.version)
            self._views[_storage_key(t)].append(entry)
            self._alive.append(t)
            return node
        return self._enter(t, node)

    # -- recording -----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._pause:
            return func(*args, **kwargs)
        if not self.lenient:
            return self._record(func, types, args, kwargs)
        self._ran = _NOT_RUN
        try:
            return self._record(func, types, args, kwargs)
        except CaptureError:
            return self._unfollowed(func, args, kwargs)

    def _record(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.Tag.inplace_view in func.tags:
            return self._record_inplace_view(func, args, kwargs)
        mutated = mutated_args(func, args, kwargs)
        if mutated:
            return self._record_mutation(func, args, kwargs, mutated)
        for statistic in unsaid_writes(func, args):
            self.state.about_to_write(statistic)
        if func is aten.glu.default:
            return self._record_glu(types, *args, **kwargs)
        as_nodes = self._as_nodes
        node_args = tuple(as_nodes(a) for a in args)
        node_kwargs = {k: as_nodes(v) for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        if self.steer is not None:
            out = self.steer(func, args, out)
        node = self.make.call(func, node_args, node_kwargs)
        node.meta["source"] = _user_line()
        if draws_random(func, args, kwargs):
            node.meta["random"] = True
        self._finish(node, out)
        if func is aten._local_scalar_dense.default:
            self.reads.append(Read(node_args[0], node.meta["source"], node.meta["call"]))
        self._outputs(func, args, kwargs, node, out)
        return out

    def _unfollowed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that cannot be written in functional form, as one that makes what it writes and returns anew."""
        written = mutated_args(func, args, kwargs)
        for tensor in written:
            self.state.about_to_write(tensor)
        node_args, node_kwargs = tuple(self._as_nodes(a) for a in args), self._as_nodes_dict(kwargs)
        out = func(*args, **kwargs) if self._ran is _NOT_RUN else self._ran
        node = self._finish(self.make.call(func, node_args, node_kwargs), None)
        made = {id(t): t for t in (*written, *leaves_of(torch.Tensor, out))}
        for number, tensor in enumerate(made.values()):
            self._enter(tensor, self._finish(self.make.call(operator.getitem, (node, number)), tensor))
        for child in (node, *node.users):
            child.meta["source"] = _user_line()
        return out

    def _record_glu(self, types: Any, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """``glu`` as what it stands for: the only activation that halves its operand would need rules of its own."""
        half = x.shape[dim] // 2
        value = self.__torch_dispatch__(aten.slice.Tensor, types, (x, dim, 0, half))
        gate = self.__torch_dispatch__(aten.slice.Tensor, types, (x, dim, half, 2 * half))
        gate = self.__torch_dispatch__(aten.sigmoid.default, types, (gate,))
        product: torch.Tensor = self.__torch_dispatch__(aten.mul.Tensor, types, (value, gate))
        return product

    @property
    def open(self) -> bool:
        """Whether what runs now is written down."""
        return not self._pause

    def record_whole(self, func: Any, args: tuple[Any, ...]) -> torch.Tensor:
        """``func`` as one node, where PyTorch runs other ops for it at other sizes."""
        self._pause += 1
        try:
            out: torch.Tensor = func(*args)
        finally:
            self._pause -= 1
        node = self.make.call(func, tuple(self._as_nodes(a) for a in args), {})
        node.meta["source"] = _user_line()
        self._finish(node, out)
        self._outputs(func, args, {}, node, out)
        return out

    def left_the_tape(self, t: torch.Tensor) -> None:
        """``t`` was turned into Python numbers or a NumPy array, which no ATen call shows."""
        if not self._pause and not torch._C._functorch.is_functorch_wrapped_tensor(t):
            self.reads.append(Read(self.node_of(t), _user_line(), self.current or 0))

    def _as_nodes(self, arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            return self.node_of(arg)
        if isinstance(arg, (list, tuple)):
            return type(arg)(self._as_nodes(a) for a in arg) if type(arg) in (list, tuple) else list(arg)
        return arg

    def _outputs(self, func: Any, args: Any, kwargs: Any, node: fx.Node, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            self._output(func, args, kwargs, node, out, None)
        elif isinstance(out, (list, tuple)):
            for i, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    child = self._finish(self.make.call(operator.getitem, (node, i)), item)
                    child.meta["source"] = node.meta["source"]
                    self._output(func, args, kwargs, child, item, i)

    def _output(self, func: Any, args: Any, kwargs: Any, node: fx.Node, out: torch.Tensor, item: int | None) -> None:
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        strided = out.layout == torch.strided
        if strided and first is not None and first is not out and _storage_key(first) == _storage_key(out):
            if out.numel() or _storage_key(out) in self._storages:
                rest = tuple(self._as_nodes(a) for a in args[1:])
                self._enter(out, node, parent=first, view=(func, rest, self._as_nodes_dict(kwargs), item))
                return
        entry = self._entries.get(id(out))
        if entry is not None and entry.ref() is out:
            return
        self._enter(out, node)

    def _as_nodes_dict(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {k: self._as_nodes(v) for k, v in kwargs.items()}

    def _record_mutation(self, func: Any, args: Any, kwargs: Any, mutated: list[torch.Tensor]) -> Any:
        if len(mutated) != 1:
            raise CaptureError(f"{func} writes to {len(mutated)} tensors at once, which is not carried", _user_line())
        target = mutated[0]
        old = self.node_of(target)
        twin = functional_twin(func, args, kwargs, target)
        node_args = tuple(self._as_nodes(a) for a in twin.args)
        node_kwargs = self._as_nodes_dict(twin.kwargs)
        key = _storage_key(target)
        storage = self._storages[key]
        self._preserve(key, storage)
        self.state.about_to_write(target)
        out = self._ran = func(*args, **kwargs)
        node = self.make.call(twin.func, node_args, node_kwargs)
        node.meta["source"] = _user_line()
        if draws_random(func, args, kwargs):
            node.meta["random"] = True
        node = self._finish(node, target)
        self.values.pop(node, None)
        for step_func, step_args in twin.after(old, node):
            node = self._finish(self.make.call(step_func, step_args), target)
            self.values.pop(node, None)
        node.meta.update(shape=tuple(target.shape), dtype=target.dtype, origin=storage.origin)
        self._write_back(target, node, storage)
        return out

    def _record_inplace_view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A new shape for a tensor that nothing else views (a bias-free layer on a vector ends so) is a new tensor."""
        target = args[0]
        if func is aten.set_.source_Tensor and _same_memory(target, args[1]):
            return func(*args, **kwargs)  # torch.nn.utils.parametrize does it to a weight that stays as it is
        old = self.node_of(target)
        entry = self._entries[id(target)]
        alone = [e for e in self._views[_storage_key(target)] if e.ref() is not None] == [entry]
        inner = old.op == "call_function" and entry.view is None and alone
        twin = _VIEW_TWINS.get(func)
        if twin is None or not inner or old in self.mutations.values():
            raise CaptureError(f"{func} changes a tensor's shape in place; use its out-of-place form", _user_line())
        if self.keep_values:
            self._pause += 1
            self.values[old] = target.detach().clone()
            self._pause -= 1
        out = func(*args, **kwargs)
        node = self.make.call(twin, (old, *args[1:]), kwargs)
        node.meta["source"] = _user_line()
        self._enter(target, self._finish(node, target))
        return out

    def _preserve(self, key: int, storage: _Storage) -> None:
        """Before a write: keep the old value of the storage's owner; views are recomputed from it."""
        if not self.keep_values:
            return
        self._views[key] = [e for e in self._views[key] if e.ref() is not None]
        for entry in self._views[key]:
            t = entry.ref()
            if t is not None:
                if entry.node is storage.owner and entry.view is None and entry.version == storage.version:
                    self._pause += 1
                    self.values[entry.node] = t.detach().clone(memory_format=torch.preserve_format)
                    self._pause -= 1
                else:
                    self.values.pop(entry.node, None)
                    if entry.node.target is operator.getitem:  # its tuple holds live views as well
                        self.values.pop(entry.node.args[0], None)  # type: ignore[arg-type]

    def _write_back(self, target: torch.Tensor, node: fx.Node, storage: _Storage) -> None:
        entry = self._entries[id(target)]
        owner = node
        current, current_entry = target, entry
        while current_entry.view is not None:
            assert current_entry.parent is not None
            parent = current_entry.parent
            base = self.node_of(parent)
            func, args, kwargs, item = current_entry.view
            inverse, inverse_args = inverse_view(func, args, kwargs, item, base, owner, parent, current)
            owner = self._finish(self.make.call(inverse, inverse_args), None)
            self.values.pop(owner, None)
            owner.meta.update(shape=tuple(parent.shape), dtype=parent.dtype)
            current, current_entry = parent, self._entries[id(parent)]
        if storage.owner.op in ("placeholder", "get_attr") or storage.owner in self.mutations.values():
            source = next((k for k, v in self.mutations.items() if v is storage.owner), storage.owner)
            self.mutations[source] = owner
        storage.owner = owner
        storage.version += 1
        current_entry.node, current_entry.version = owner, storage.version
        entry.node, entry.version = node, storage.version

    # -- module calls --------------------------------------------------------------------------

    def enter_call(self, module: nn.Module, args: Any, kwargs: Any) -> Call:
        """A submodule's call begins."""
        path = self._paths.get(id(module), f"<{type(module).__name__}>")
        call = Call(len(self.calls), path, module, self.current, len(self.nodes))
        call.args = tree_map(torch.Tensor, self._boundary, tuple(args))
        call.kwargs = tree_map(torch.Tensor, self._boundary, dict(kwargs))
        call.first = len(self.nodes)
        self.calls.append(call)
        self.current = call.index
        return call

    def _boundary(self, t: torch.Tensor) -> Any:
        """The node of a tensor that crosses a module's boundary; tensors inside vmap or grad have none."""
        return _WRAPPED if torch._C._functorch.is_functorch_wrapped_tensor(t) else self.node_of(t)

    def through_call(self, run: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """``run(module, *args, **kwargs)`` as a call on the tape."""
        call = self.enter_call(module, args, kwargs)
        output = run(module, *args, **kwargs)
        self.leave_call(call, output)
        return output

    def leave_call(self, call: Call, output: Any) -> None:
        """A submodule's call ended."""
        call.output = tree_map(torch.Tensor, self._boundary, output)
        call.last = len(self.nodes)
        self.current = call.parent


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    place = [(_storage_key(t), t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return place[0] == place[1]


def draws_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True where a call depends on the random state: dropout with a rate of zero does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, arg in enumerate(func._schema.arguments):
        if arg.name in ("dropout_p", "p") and str(arg.type) == "float":
            rate = kwargs.get(arg.name, args[i] if i < len(args) else arg.default_value)
            return rate is None or rate != 0.0
    return True


_NOT_THE_USERS = (torch.__path__[0], str(Path(__file__).parents[1]))


def _user_line() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor ours."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _distances(
    x1: torch.Tensor, x2: torch.Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary"
) -> tuple[torch.Tensor, torch.Tensor, float, int | None]:
    """The arguments of ``aten.cdist`` for those of ``torch.cdist``."""
    modes = {
        "use_mm_for_euclid_dist_if_necessary": None,
        "use_mm_for_euclid_dist": 1,
        "donot_use_mm_for_euclid_dist": 2,
    }
    return x1, x2, float(p), modes[compute_mode]


def _wrapped(arg: Any) -> bool:
    """True for what ``vmap`` and its like put in the place of a tensor."""
    return isinstance(arg, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(arg)


class _WatchReads(TorchFunctionMode):
    """Notices ``.tolist()``, ``.numpy()`` and ``np.asarray``, which leave no trace on the tape, and ``torch.cdist``,
    for which PyTorch runs a product of matrices or not by the number of rows."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_TAPE:
            self.recorder.left_the_tape(args[0])
        if func is torch.cdist and self.recorder.open and not any(map(_wrapped, args)):
            return self.recorder.record_whole(aten.cdist.default, _distances(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


_LEAVES_TAPE = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


def record(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    keep_values: bool = True,
    steer: Steer | None = None,
    lenient: bool = False,
) -> Tape:
    """Run ``module(*args, **kwargs)`` once and return its :class:`Tape`.

    Args:
        module: any module; run in the mode it is in. Its state is restored afterwards.
        args, kwargs: inputs; tensors in them are cloned first, so the caller's are never written to.
        keep_values: keep every node's value (a block), or only the graph (a whole model).
        lenient: go on after a call that the tape cannot carry; its result then comes from nowhere in particular. For
            a whole model, of which the tape only tells where to look.
        steer: may answer another output than the one an op computed; see ``moeopt.capture.force_routing``.

    Raises:
        CaptureError: the module raised, or did something that the trace cannot carry.
    """
    state = ModuleState(module)
    recorder = _Recorder(module, state, keep_values, steer, lenient)
    args, kwargs = clone_inputs((tuple(args), dict(kwargs or {})))
    rng = torch.get_rng_state()
    try:
        with torch.no_grad():
            counter = iter(range(10**9))
            node_args, node_kwargs = tree_map(
                torch.Tensor, lambda t: recorder.add_input(t, f"input_{next(counter)}"), (args, kwargs)
            )
            with module_calls(recorder.through_call), _WatchReads(recorder), recorder:
                try:
                    output = module(*args, **kwargs)
                except CaptureError:
                    raise
                except Exception as err:
                    raise CaptureError(
                        f"{type(module).__name__} raised {type(err).__name__}: {err}; "
                        "check that it runs on these inputs in eager mode"
                    ) from err
                attributes = {
                    key: tree_map(torch.Tensor, recorder.node_of, value)
                    for key, value in state.changed_attributes().items()
                }
            in_place = state.changed_in_place()
            root = recorder.calls[0]
    finally:
        state.restore()
        torch.set_rng_state(rng)
    return Tape(
        root=module,
        calls=recorder.calls,
        args=node_args,
        kwargs=node_kwargs,
        output=root.output,
        concrete_output=output,
        mutations=recorder.mutations,
        attributes=attributes,
        in_place=in_place,
        reads=recorder.reads,
        nodes=recorder.nodes,
        _values=recorder.values,
    )


def clone_inputs(tree: Any) -> Any:
    """The same structure with every tensor cloned (shared memory stays shared is not promised)."""
    return tree_map(torch.Tensor, lambda t: t.detach().clone(), tree)
