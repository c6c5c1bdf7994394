"""Each ATen call of a run as a node in functional form, with the module call and the line that made the call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator

from moeopt.capture.functional import functional_twin, mutated_args, unsaid_writes
from moeopt.capture.memory_nodes import MemoryNodes, storage_key, unusual_layout
from moeopt.capture.module_state import ModuleState
from moeopt.capture.recorded import Call, Read
from moeopt.capture.source_line import user_line
from moeopt.capture.tree import leaves_of, tree_map
from moeopt.capture.user_modes import active_user_mode
from moeopt.errors import CaptureError
from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten


Steer = Callable[[Any, tuple[Any, ...], Any], Any]


_WRAPPED = object()


_NOT_RUN = object()


_ATTENTION_ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default


_VIEW_TWINS = {
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
}


class Recorder(MemoryNodes):
    """Writes each ATen call down as a node; see :func:`record`."""

    supports_higher_order_operators = True

    def __init__(
        self, root: nn.Module, state: ModuleState, keep_values: bool, steer: Steer | None, lenient: bool
    ) -> None:
        super().__init__(state, keep_values)
        self.steer, self.lenient = steer, lenient
        self._ran: PyObject = _NOT_RUN
        self.root, self.state = root, state
        self.calls: list[Call] = []
        self.reads: list[Read] = []
        self._paths = {id(m): name for name, m in state.modules}

    # -- recording -----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> PyObject:
        kwargs = kwargs or {}
        if self._pause:
            return func(*args, **kwargs)
        if not self.lenient:
            if isinstance(func, HigherOrderOperator):
                raise CaptureError(
                    f"its forward calls {func.name()}, which runs functions of its own inside; where it stands outside "
                    "the mixture, put the mixture into a module of its own",
                    user_line(),
                )
            return self._record(func, types, args, kwargs)
        self._ran = _NOT_RUN
        if isinstance(func, HigherOrderOperator):
            return self._unfollowed(func, args, kwargs)
        try:
            return self._record(func, types, args, kwargs)
        except CaptureError:
            return self._unfollowed(func, args, kwargs)

    def _record(self, func: FxTarget, types: PyObject, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyObject:
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
        if func is _ATTENTION_ON_CPU:
            self._attention(node_args, node_kwargs, out[0], draws_random(func, args, kwargs))
        node = self.make.call(func, node_args, node_kwargs)
        node.meta["source"] = user_line()
        if draws_random(func, args, kwargs):
            node.meta["random"] = True
        self._finish(node, out)
        if func is aten._local_scalar_dense.default:
            self.reads.append(Read(node_args[0], node.meta["source"], node.meta["call"]))
        self._outputs(func, args, kwargs, node, out)
        return out

    def _unfollowed(self, func: FxTarget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyObject:
        """A call that cannot be written in functional form, as one that makes what it writes and returns anew."""
        written = mutated_args(func, args, kwargs)
        for tensor in written:
            self.state.about_to_write(tensor)
        nodes = tuple(self.node_of(t) for t in leaves_of(torch.Tensor, (args, kwargs)))
        out = func(*args, **kwargs) if self._ran is _NOT_RUN else self._ran
        node = self._finish(self.make.call(func, nodes), None)
        made = {id(t): t for t in (*written, *leaves_of(torch.Tensor, out))}
        for number, tensor in enumerate(made.values()):
            self._enter(tensor, self._finish(self.make.call(operator.getitem, (node, number)), tensor))
        for child in (node, *node.users):
            child.meta["source"] = user_line()
        return out

    def _record_glu(self, types: PyObject, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """``glu`` as what it stands for: the only activation that halves its operand would need rules of its own."""
        half = x.shape[dim] // 2
        value = self.__torch_dispatch__(aten.slice.Tensor, types, (x, dim, 0, half))
        gate = self.__torch_dispatch__(aten.slice.Tensor, types, (x, dim, half, 2 * half))
        gate = self.__torch_dispatch__(aten.sigmoid.default, types, (gate,))
        product: torch.Tensor = self.__torch_dispatch__(aten.mul.Tensor, types, (value, gate))
        return product

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor, random: bool) -> None:
        """What an attention's kernel gives, as the call that PyTorch chose the kernel for: on a sequence of no tokens
        the kernel itself ends the process, and PyTorch takes another."""
        query, key, value, *rest = args
        given = {"dropout_p": 0.0, "is_causal": False} | dict(zip(("dropout_p", "is_causal"), rest, strict=False))
        given |= {"enable_gqa": query.meta["shape"][-3] != key.meta["shape"][-3]} | kwargs
        node = self.make.call(aten.scaled_dot_product_attention.default, (query, key, value), given)
        node.meta["source"] = user_line()
        if random:
            node.meta["random"] = True
        self._enter(out, self._finish(node, out))

    @property
    def open(self) -> bool:
        """Whether what runs now is written down."""
        return not self._pause

    def record_whole(self, func: FxTarget, args: tuple[Any, ...]) -> torch.Tensor:
        """``func`` as one node, where PyTorch runs other ops for it at other sizes."""
        self._pause += 1
        try:
            out: torch.Tensor = func(*args)
        finally:
            self._pause -= 1
        node = self.make.call(func, tuple(self._as_nodes(a) for a in args), {})
        node.meta["source"] = user_line()
        self._finish(node, out)
        self._outputs(func, args, {}, node, out)
        return out

    def left_the_tape(self, t: torch.Tensor) -> None:
        """``t`` was turned into Python numbers or a NumPy array, which no ATen call shows."""
        if not self._pause and not torch._C._functorch.is_functorch_wrapped_tensor(t):
            self.reads.append(Read(self.node_of(t), user_line(), self.current or 0))

    def _outputs(self, func: FxTarget, args: PyObject, kwargs: PyObject, node: fx.Node, out: PyObject) -> None:
        if isinstance(out, torch.Tensor):
            self._output(func, args, kwargs, node, out, None)
        elif isinstance(out, (list, tuple)):
            for i, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    child = self._finish(self.make.call(operator.getitem, (node, i)), item)
                    child.meta["source"] = node.meta["source"]
                    self._output(func, args, kwargs, child, item, i)

    def _output(
        self, func: FxTarget, args: PyObject, kwargs: PyObject, node: fx.Node, out: torch.Tensor, item: int | None
    ) -> None:
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        within = first is not None and first is not out and not unusual_layout(out)
        if within and first is not None and storage_key(first) == storage_key(out):
            if out.numel() or storage_key(out) in self._storages:
                rest = tuple(self._as_nodes(a) for a in args[1:])
                self._enter(out, node, parent=first, view=(func, rest, self._as_nodes_dict(kwargs), item))
                return
        entry = self._entries.get(id(out))
        if entry is not None and entry.ref() is out:
            return
        self._enter(out, node)

    def _record_mutation(
        self, func: FxTarget, args: PyObject, kwargs: PyObject, mutated: list[torch.Tensor]
    ) -> PyObject:
        if len(mutated) != 1:
            raise CaptureError(f"{func} writes to {len(mutated)} tensors at once, which is not carried", user_line())
        target = mutated[0]
        old = self.node_of(target)
        twin = functional_twin(func, args, kwargs, target)
        node_args = tuple(self._as_nodes(a) for a in twin.args)
        node_kwargs = self._as_nodes_dict(twin.kwargs)
        key = storage_key(target)
        storage = self._storages[key]
        self._preserve(key, storage)
        self.state.about_to_write(target)
        out = self._ran = func(*args, **kwargs)
        node = self.make.call(twin.func, node_args, node_kwargs)
        node.meta["source"] = user_line()
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

    def _record_inplace_view(self, func: FxTarget, args: PyObject, kwargs: PyObject) -> PyObject:
        """A new shape for a tensor that nothing else views (a bias-free layer on a vector ends so) is a new tensor."""
        target = args[0]
        if func is aten.set_.source_Tensor and _same_memory(target, args[1]):
            return func(*args, **kwargs)  # torch.nn.utils.parametrize does it to a weight that stays as it is
        old = self.node_of(target)
        entry = self._entries[id(target)]
        alone = [e for e in self._views[storage_key(target)] if e.ref() is not None] == [entry]
        inner = old.op == "call_function" and entry.view is None and alone
        twin = _VIEW_TWINS.get(func)
        if twin is None or not inner or old in self.mutations.values():
            raise CaptureError(f"{func} changes a tensor's shape in place; use its out-of-place form", user_line())
        if self.keep_values:
            self._pause += 1
            self.values[old] = target.detach().clone()
            self._pause -= 1
        out = func(*args, **kwargs)
        node = self.make.call(twin, (old, *args[1:]), kwargs)
        node.meta["source"] = user_line()
        self._enter(target, self._finish(node, target))
        return out

    # -- module calls --------------------------------------------------------------------------

    def enter_call(self, module: nn.Module, args: PyObject, kwargs: PyObject) -> Call:
        """A submodule's call begins."""
        path = self._paths.get(id(module), f"<{type(module).__name__}>")
        call = Call(len(self.calls), path, module, self.current, len(self.nodes))
        call.args = tree_map(torch.Tensor, self._boundary, tuple(args))
        call.kwargs = tree_map(torch.Tensor, self._boundary, dict(kwargs))
        call.first = len(self.nodes)
        call.autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        call.mode = active_user_mode()
        self.calls.append(call)
        self.current = call.index
        return call

    def _boundary(self, t: torch.Tensor) -> PyObject:
        """The node of a tensor that crosses a module's boundary; tensors inside vmap or grad have none."""
        return _WRAPPED if torch._C._functorch.is_functorch_wrapped_tensor(t) else self.node_of(t)

    def through_call(
        self, run: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: PyObject
    ) -> PyObject:
        """``run(module, *args, **kwargs)`` as a call on the tape."""
        call = self.enter_call(module, args, kwargs)
        output = run(module, *args, **kwargs)
        self.leave_call(call, output)
        return output

    def leave_call(self, call: Call, output: PyObject) -> None:
        """A submodule's call ended."""
        call.output = tree_map(torch.Tensor, self._boundary, output)
        call.last = len(self.nodes)
        self.current = call.parent


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    place = [(storage_key(t), t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return place[0] == place[1]


def draws_random(func: FxTarget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True where a call depends on the random state: dropout with a rate of zero does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, arg in enumerate(func._schema.arguments):
        if arg.name in ("dropout_p", "p") and str(arg.type) == "float":
            rate = kwargs.get(arg.name, args[i] if i < len(args) else arg.default_value)
            return rate is None or rate != 0.0
    return True
