"""What in the code of a block's experts stands in the way, by its own name and line.

Looked for where the reading found no experts that the op could run, and only to say why: a wrong name would send the
owner to the wrong line, so each is found from what the block computed, and a block that shows none of them gets the
general words of ``moeopt.recognise.decline_reasons``.
"""

from __future__ import annotations

import operator

from torch import fx, nn
from torch.nn.utils import parametrize

from moeopt.capture.op_kinds import is_factory, is_matmul, is_pointwise, moves_rows, op_name, picks_rows
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Call, Tape
from moeopt.capture.tree import leaves_of
from moeopt.errors import Declined
from moeopt.obstacles import Rank
from moeopt.recognise.attention_inside import attends
from moeopt.recognise.gemm_sites import weight_and_operand
from moeopt.recognise.recurrences import recurrence
from moeopt.recognise.router_steers import CHOICES, becomes_a_number
from moeopt.recognise.rows_of_others import (
    adds_up_neighbours,
    attends_inside,
    chosen_among_tokens,
    multiplied_with_each_other,
)
from moeopt.recognise.unnamed import Unnamed
from moeopt.recognise.weights_for_rows import mixed_kernels, single_neurons

_REMOVERS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
_ATTENTION = ("scaled_dot_product", "_scaled_dot_product", "_softmax", "softmax")
_NORMS = ("native_layer_norm", "_fused_rms_norm", "native_group_norm", "rsqrt")


def named_obstacle(tape: Tape) -> Declined | None:
    """The first that is there: computed weights, values outside PyTorch, branches, single neurons."""
    for look in (_computed_weights, left_pytorch, branches, single_neurons):
        found = look(tape)
        if found is not None:
            return found
    return None


def certain_obstacle(tape: Tape) -> Declined | None:
    """One that is true whatever else the block does."""
    looks = (left_pytorch, branches, mixed_kernels, _unequal_experts, _recurrence, _neighbours, _attention,
             chosen_among_tokens)  # fmt: skip
    return next((found for look in looks if (found := look(tape)) is not None), None)


def _recurrence(tape: Tape) -> Declined | None:
    return recurrence(tape, alike_children(tape.root))


def _neighbours(tape: Tape) -> Declined | None:
    return adds_up_neighbours(tape, alike_children(tape.root))


def _attention(tape: Tape) -> Declined | None:
    experts = alike_children(tape.root)
    inside = attends_inside(tape, experts)
    return None if inside is None else attends(tape, inside, experts, inside.meta.get("source", ""))


def _unequal_experts(tape: Tape) -> Declined | None:
    """Modules of one list that ran on rows picked for them, or all on the same rows, of one structure and several sizes
    or of several depths."""
    for home in tape.root.modules():
        if not isinstance(home, (nn.ModuleList, nn.ModuleDict)) or len(home) < 2:
            continue
        own = set(home.children())
        ran = [c for c in tape.calls if c.module in own]
        if len({tuple(leaves_of(fx.Node, c.args)) for c in ran}) > 1:  # not all on the same rows
            ran = [c for c in ran if any(picks_rows(a) for a in leaves_of(fx.Node, c.args))]
        if _are_choosers(ran):  # gates over several numbers of experts
            continue
        sizes = {tuple(tuple(p.shape) for p in c.module.parameters()) for c in ran}
        line = tape.nodes[ran[0].first].meta.get("source", "") if ran else ""
        if len(sizes) > 1 and len({tuple(len(shape) for shape in one) for one in sizes}) == 1:
            normed = any(op_name(n) in _NORMS for n in tape.nodes[ran[0].first : ran[-1].last + 1])
            zeros = (
                "zeros would change what its norm computes" if normed else "a smaller one can be filled up with zeros"
            )
            return Declined(
                f"its experts have different shapes ({' and '.join(sorted(map(str, sizes))[:2])}); give all the same "
                f"sizes ({zeros})",
                line,
            )
        depths = sorted({sum(len(shape) == 2 for shape in one) for one in sizes})
        if len(depths) > 1 and depths[0] > 1:
            return Declined(
                f"its experts differ in depth ({' and '.join(map(str, depths))} matrices), and the op runs one "
                "function on all of them; give all the same layers, or route to each group of alike experts by a "
                "block of its own",
                line,
            )
    return None


def _are_choosers(ran: list[Call]) -> bool:
    """Whether a softmax or a top-k reads what one of the calls gave, or is what it gave."""
    results = [node for c in ran for node in leaves_of(fx.Node, c.output)]
    return any("softmax" in op_name(n) or op_name(n) == "topk" for r in results for n in (r, *r.users))


def alike_children(root: nn.Module) -> dict[nn.Module, nn.Module]:
    """Children of lists whose Parameters have the same shapes, and their lists."""
    found: dict[nn.Module, nn.Module] = {}
    for home in root.modules():
        if isinstance(home, (nn.ModuleList, nn.ModuleDict)) and len(home) > 1:
            if len({tuple(p.shape for p in child.parameters()) for child in home.children()}) == 1:
                found.update(dict.fromkeys(home.children(), home))
    return found


def _computed_weights(tape: Tape) -> Declined | None:
    """A weight that a hook or a parametrization of ``torch.nn.utils`` makes at each call."""
    experts = {m for child in alike_children(tape.root) for m in child.modules()}
    for path, module in tape.root.named_modules():
        stacked = any(p.dim() > 2 for p in module.parameters()) or _holds_codes(module)
        if module not in experts and not stacked:
            continue
        if reason := computed_weight(path, module):
            return Declined(reason)
    return None


def computed_weight(path: str, module: nn.Module) -> str:
    """The reason for a module with a weight that ``torch.nn.utils`` makes at each call, and its way out; else ""."""
    hooks = [type(h).__name__ for h in module._forward_pre_hooks.values() if _makes_weights(h)]
    if hooks:
        what, way_out = hooks[0], _REMOVERS.get(hooks[0], "prune.remove")
    elif parametrize.is_parametrized(module):
        held = next(iter(module.parametrizations.values()))  # type: ignore[operator]
        what, way_out = type(held[0]).__name__, "parametrize.remove_parametrizations"
        if _holds_codes(module):
            return (
                f"its experts' weights are codes that a parametrisation ({what} on {path or 'the block'}) makes floats "
                "of, all experts at each call, and the op reads weights as they are stored; load the model without "
                f"that quantiser, or make them floats once with torch.nn.utils.{way_out}, and give quantize='int4' or "
                "'int8' to moeopt.optimize: it holds codes, and makes one expert floats at a time"
            )
    else:
        return ""
    return (
        f"its experts' weights are computed at each call ({what} on {path or 'the block'}), and the op reads "
        f"weights as they are stored; make them plain with torch.nn.utils.{way_out} and optimise again"
    )


def _holds_codes(module: nn.Module) -> bool:
    """Whether a parametrisation of ``module`` computes a weight from integers."""
    if not parametrize.is_parametrized(module):
        return False
    lists = module.parametrizations.values()  # type: ignore[operator]
    return any(not t.is_floating_point() for held in lists for t in held.parameters(recurse=False))


def _makes_weights(hook: object) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


def left_pytorch(tape: Tape) -> Declined | None:
    """Numbers that came back as a new tensor after values had left PyTorch, and that the result depends on."""
    wanted = ancestors(tape.results())
    came_back = [n.meta["index"] for n in tape.nodes if "constant" in n.meta and n in wanted and n.meta["shape"] != ()]
    for read in tape.reads:
        varies = any(n.op == "placeholder" for n in ancestors([read.node]))
        whole = read.node.meta.get("shape") not in ((), None)
        if varies and whole and any(i > read.node.meta["index"] for i in came_back):
            return Declined(
                "its forward takes values out of PyTorch (NumPy, or lists) and brings them back as a new tensor, which "
                "no graph follows; compute that part with torch operations",
                read.line,
            )
    return None


def branches(tape: Tape) -> Declined | None:
    """A Python number made of floats that depend on the input otherwise than by a choice of experts."""
    steered: dict[fx.Node, bool] = {}
    for node in tape.nodes:
        dtype = node.meta.get("dtype")
        floating = dtype is not None and dtype.is_floating_point
        first = node.args[0] if node.target is operator.getitem else node
        chosen = isinstance(first, fx.Node) and op_name(first) in CHOICES
        if chosen and not floating:
            steered[node] = False
        elif node.op == "placeholder":
            steered[node] = floating
        else:
            steered[node] = any(steered[a] for a in node.all_input_nodes)
    for read in tape.reads:
        shape = read.node.meta.get("shape")
        if steered.get(read.node, False) and shape is not None and all(size == 1 for size in shape):
            return Declined(becomes_a_number(read.node), read.line)
    return None


def between_products(tape: Tape) -> Declined | None:
    """What stands between the matmuls with the experts' weights."""
    for look in (_recurrence, _neighbours):
        if (found := look(tape)) is not None:
            return found
    sites = expert_products(tape)
    if (mixed := multiplied_with_each_other(tape, sites)) is not None:
        return attends(tape, mixed, alike_children(tape.root), mixed.meta.get("source", ""))
    if len(sites) < 2:
        return None
    between = (set(descendants(tape, sites)) & ancestors(sites)) - set(sites)
    odd = sorted((n for n in between if not _plain(n)), key=lambda n: n.meta["index"])
    line = odd[0].meta.get("source", "") if odd else sites[0].meta.get("source", "")
    names = [op_name(n) for n in odd]
    if (attention := next((n for n in odd if op_name(n).startswith(_ATTENTION)), None)) is not None:
        return attends(tape, attention, alike_children(tape.root), line)
    batch = next((n for n in odd if "batch_norm" in op_name(n)), None)
    if batch is not None and True in batch.args:
        return Declined(
            "its experts normalise over the rows that reach them (batch norm with the statistics of the batch), so a "
            "token's result depends on the other tokens; call model.eval() on a norm with running statistics, or use a "
            "norm over the features",
            batch.meta.get("source"),
        )
    together = any(op_name(s) in ("bmm", "baddbmm", "_grouped_mm") for s in sites)
    if odd and together and all(n in (*_NORMS, "getitem", "mean", "var_mean") for n in names):
        return Declined(
            f"its experts are computed together, in products of all of them, with a norm between ({names[0]}), and "
            "such experts are carried one by one only; call each expert on its own rows (a loop over modules), or move "
            "the norm before the experts",
            line,
            rank=Rank.READING,
        )
    if odd:
        return Unnamed(
            "between its experts' matmuls stands something that is not element-wise on each token's row "
            f"({', '.join(dict.fromkeys(names))}: it mixes rows, depends on the whole batch, or weighs the hidden "
            "neurons), which the op does not carry",
            line,
            rank=Rank.READING,
        )
    return None


def complex_products(tape: Tape) -> Declined | None:
    """Experts of complex matrices."""
    site = next((n for n in expert_products(tape) if getattr(n.meta.get("dtype"), "is_complex", False)), None)
    if site is None:
        return None
    return Declined(
        "its experts are matrices of complex numbers (as of the frequencies of torch.fft), and the op carries real "
        "ones; for x = a + i b write each as one real matrix, cat([a, b], -1) @ [[re, im], [-im, re]], or leave the "
        "block as it is",
        site.meta.get("source", ""),
    )


def _plain(node: fx.Node) -> bool:
    return moves_rows(node) or is_pointwise(node) or is_matmul(node) or is_factory(node)


def expert_products(tape: Tape) -> list[fx.Node]:
    """Products with weights of alike modules, or with parts of a stack; none of a list of gates."""
    experts = {id(p): home for child, home in alike_children(tape.root).items() for p in child.parameters()}
    named = dict(tape.root.named_parameters(remove_duplicate=False))
    memo: dict[fx.Node, bool] = {}
    homes: dict[nn.Module | None, list[fx.Node]] = {}
    for node in tape.nodes:
        found = weight_and_operand(node, memo) if is_matmul(node) else None
        if found is None:
            continue
        held = [named[str(n.target)] for n in ancestors([found[0]]) if n.op == "get_attr" and str(n.target) in named]
        home = next((experts[id(p)] for p in held if id(p) in experts), None)
        if home is not None or any(p.dim() > 2 for p in held):
            homes.setdefault(home, []).append(node)
    kept = {n for home, own in homes.items() if not _are_gates(home, own) for n in own}
    return [n for n in tape.nodes if n in kept]


def _are_gates(home: nn.Module | None, products: list[fx.Node]) -> bool:
    """Whether the ``products`` of a list's modules, one each, are scores that a softmax reads."""
    scores = home is not None and len(products) <= len(list(home.children()))
    users = {u for p in products for near in (p, *p.users) for u in (near, *near.users)} if scores else set()
    return any("softmax" in op_name(n) for n in users)
