"""The products outside of experts in fewer bits: attention's projections, ``lm_head``, dense FFNs that were left.

Each is a module that computes one product with its one matrix (:func:`~moeopt.rewrite.product_codes.product_of`) and
that a run of the model calls. A copy of the model gets the product on codes, or the module's own code on the floats
that the codes mean: what the first is compared with. Nothing is changed where a weight is tied: the other place that
holds it keeps its floats.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moeopt.capture.tape import record
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import UsageError
from moeopt.find.choosing_products import choosing_products
from moeopt.ir.weight_format import FORMATS, INT8_CHANNEL
from moeopt.listed import listed
from moeopt.options import Options, QuantPlan
from moeopt.options.quant_plan import EVERY, FLOAT, GPTQ
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.pipeline.enclosing import with_router
from moeopt.pipeline.real_calls import real_calls
from moeopt.quantization.product_rows import rows_of_products
from moeopt.rewrite.product_codes import CodesProduct, ModuleProduct, on_floats, product_of
from moeopt.rewrite.rounded_matrix import FEWEST
from moeopt.sizes import in_megabytes


@dataclass
class QuantizedProduct:
    """One product: the paths at which a model holds its module, that module, and the product on codes."""

    paths: list[str]
    module: nn.Module
    product: ModuleProduct
    codes: CodesProduct

    @property
    def group(self) -> str:
        """What a report tells the loss of: the module that holds it, like an attention; itself at a model's top."""
        return self.paths[0].rpartition(".")[0] or self.paths[0]

    @property
    def float_bytes(self) -> int:
        """Of the weight that the codes stand for."""
        N, K = self.codes.size
        return int(N * K * self.codes.dtype.itemsize)


class QuantizedProducts:
    """The products of a model that a plan gives a format, and sentences on those that it cannot have.

    ``few``: the paths of those that too few rows of calibration data reach for the plan's method.
    """

    def __init__(
        self, found: Iterable[QuantizedProduct] = (), left: Iterable[str] = (), few: Iterable[str] = ()
    ) -> None:
        self.found, self.left, self.few = list(found), list(left), list(few)
        self._others: dict[tuple[str, str], CodesProduct] = {}

    @property
    def formats(self) -> dict[str, str]:
        """``certificate.products``: the format of each, by its path."""
        return {one.paths[0]: str(one.codes.format) for one in self.found}

    @property
    def groups(self) -> dict[str, list[QuantizedProduct]]:
        """By what a report tells the loss of."""
        groups: dict[str, list[QuantizedProduct]] = {}
        for one in self.found:
            groups.setdefault(one.group, []).append(one)
        return groups

    def put(self, model: nn.Module, codes: Collection[str] | None = None, scheme: str = "") -> None:
        """Give a copy of the model the products on codes, all or those of the groups ``codes``; the others floats.

        ``scheme``: ``"int8"`` per channel or ``"nearest"`` instead of the codes that the plan's format and method give.
        """
        for one in self.found:
            wanted = codes is None or one.group in codes
            _place(model, one.paths, self._codes(one, scheme) if wanted else one.module)

    @contextlib.contextmanager
    def only(self, model: nn.Module, codes: Collection[str], scheme: str = "") -> Iterator[None]:
        """While open, the products of the groups ``codes`` alone are on codes; ``scheme`` as :meth:`put` has it."""
        self.put(model, codes, scheme)
        try:
            yield
        finally:
            self.put(model)

    def put_floats(self, model: nn.Module) -> None:
        """Give a copy of the original its own code on the floats that the codes mean."""
        for one in self.found:
            _place(model, one.paths, on_floats(model.get_submodule(one.paths[0]), one.product, one.codes))

    def _codes(self, one: QuantizedProduct, scheme: str) -> CodesProduct:
        if not scheme:
            return one.codes
        key = one.paths[0], scheme
        if key not in self._others:
            format = INT8_CHANNEL if scheme == "int8" else one.codes.format
            self._others[key] = CodesProduct(one.module, one.product, format, one.paths[0])
        return self._others[key]

    def note(self) -> list[str]:
        """Sentences for the report: the memory, and what stays float."""
        told = []
        if self.found:
            codes, floats = (
                in_megabytes(sum(sizes))
                for sizes in zip(*((one.codes.held.nbytes, one.float_bytes) for one in self.found), strict=True)
            )
            count = f"{len(self.found)} product{'s' * (len(self.found) > 1)}"
            told.append(
                f"{count} outside of MoE blocks {'are' if self.found[1:] else 'is'} quantised, {floats} of "
                f"floats to {codes}"
            )
        if self.few:
            told.append(
                f"method='gptq': too few rows of calibration= reach {listed(self.few, 4)}, whose scales were searched "
                "instead: give more calls"
            )
        return told + [f"not quantised: {sentence}" for sentence in self.left]


def quantize_products(
    source: nn.Module, twin: nn.Module, outcome: PipelineResult, call: ArgsKwargs, options: Options,
    calls: Sequence[ArgsKwargs],
) -> QuantizedProducts:  # fmt: skip
    """Give the rewritten copy ``twin`` of ``source`` the products on codes that the plan asks for.

    ``calls``: of ``calibration=``, whose rows the plan's method weighs by.

    Raises:
        UsageError: a pattern of the plan matches no product; a weight holds NaN or infinity.
    """
    plan: QuantPlan | None = options.quantize
    if plan is None or not plan.products:
        return QuantizedProducts()
    options.say("quantising the products outside of MoE blocks")
    choices = _choices(source, call)
    inside = _closed(twin, outcome, choices)
    modules, taken = _products(twin, inside)
    seen, changed = real_calls(twin, call, {paths[0] for _, _, paths in modules.values()})
    places = [path for _, _, paths in modules.values() for path in paths]
    _check_patterns(plan, places)
    taken_on: dict[str, tuple[nn.Module, ModuleProduct, list[str], str]] = {}
    left = []
    for module, product, paths in modules.values():
        name = _format_of(plan, paths)
        if name == FLOAT:
            continue
        if paths[0] not in seen:
            left.append(f"{paths[0]}: no call of it was seen, so whoever holds it reads its weight")
        elif paths[0] in changed:
            left.append(f"{paths[0]}: {changed[paths[0]]}")
        elif chosen := next((choices[path] for path in paths if path in choices), ""):
            left.append(
                f"{paths[0]}: it is a router, its results are chosen from ({chosen}), and rounding moves choices"
            )
        elif not bool(torch.isfinite(getattr(module, product.weight)).all()):
            raise UsageError(
                f"the weight of {paths[0]} holds NaN or infinity, for which there is no code: give it the format "
                f"'float' in QuantPlan(products=), before other patterns: {{{paths[0]!r}: 'float', ...}}"
            )
        else:
            taken_on[paths[0]] = module, product, paths, name
    found, few = [], []
    for path, rows in rows_of_products(source, list(taken_on), calls):
        module, product, paths, name = taken_on[path]
        codes = CodesProduct(module, product, FORMATS[name], path, plan.method, rows)
        found.append(QuantizedProduct(paths, module, product, codes))
        few += [path] * (plan.method == GPTQ and (rows is None or len(rows) < FEWEST))
    if not places:
        left.append("products: the model has none outside of MoE blocks and rewritten ones")
    left += [*_tied(twin, found), *taken, *_no_products(twin, inside, modules, plan)]
    products = QuantizedProducts(found, left, few)
    products.put(twin)
    return products


_NO_CACHE = "; key/value caches of engines stay floats: no operator that engines use reads them as codes"
Modules = dict[int, tuple[nn.Module, ModuleProduct, list[str]]]
Inside = Callable[[str], bool]


def _format_of(plan: QuantPlan, paths: Sequence[str]) -> str:
    """The format that the plan asks for one module at these paths.

    Raises:
        UsageError: patterns of the plan ask for several.
    """
    asked = {path: name for path in paths if (name := plan.asked_of_product(path)) is not None}
    if len({*asked.values()}) > 1:
        words = ", ".join(f"{path}: {name}" for path, name in asked.items())
        raise UsageError(
            f"{' and '.join(asked)} are one module, for which QuantPlan(products=) asks several formats ({words}): "
            "give one pattern that names all of its places"
        )
    return next(iter(asked.values()), FLOAT)


def _products(twin: nn.Module, inside: Inside) -> tuple[Modules, list[str]]:
    """The modules that are not ``inside`` and compute a product, with all their paths."""
    found: Modules = {}
    shared = []
    for path, module in twin.named_modules(remove_duplicate=False):
        if inside(path):
            if id(module) in found:
                shared.append(f"{found.pop(id(module))[2][0]}: a MoE block holds it as well")
        elif id(module) in found:
            found[id(module)][2].append(path)
        elif (product := product_of(module)) is not None:
            found[id(module)] = module, product, [path]
    return found, shared


def _choices(source: nn.Module, call: ArgsKwargs) -> dict[str, str]:
    """The modules with a matrix whose results choose, by path, and what by."""
    held = {p for p, m in source.named_modules() if any(w.dim() == 2 for w in m.parameters(recurse=False))}
    return choosing_products(record(source, *call, keep_values=False, lenient=True), held)


def _closed(twin: nn.Module, outcome: PipelineResult, choices: Collection[str]) -> Inside:
    """Whether a path lies in a MoE block, the module that holds its router, or a rewritten block.

    A dense FFN that was left alone, such as a shared expert, lies in none, unless it is a router.
    """
    names = [b.name for b in outcome.blocks if b.kind == "moe" or b.status == "rewritten"]
    paths = ["" if name == type(twin).__name__ else name for name in names]
    around = [held[0] for path in paths if (held := with_router(path, outcome.calls)) is not None and held[0]]
    closed = tuple(f"{path}." if path else "" for path in (*paths, *around))
    left = [f"{b.name}." for b in outcome.blocks if b.kind == "dense_ffn" and b.status == "declined"]
    dense = tuple(name for name in left if not any(f"{path}.".startswith(name) for path in choices))
    return lambda path: f"{path}.".startswith(closed) and not f"{path}.".startswith(dense)


def _no_products(twin: nn.Module, inside: Inside, modules: Modules, plan: QuantPlan) -> list[str]:
    """A sentence on the matrices that the plan's patterns name, of modules that compute other than one product."""
    told: list[str] = []
    for path, module in twin.named_modules():
        if id(module) in modules or inside(path) or plan.product_format_of(path) == FLOAT:
            continue
        if product_of(module) is None:
            told += [f"{path}.{name}" for name, p in module.named_parameters(recurse=False) if p.dim() == 2]
    if not told:
        return []
    them = "these" if told[1:] else "this"
    return [f"{listed(told, 4)}: what computes with {them} is no module of one product alone"]


def _check_patterns(plan: QuantPlan, paths: list[str]) -> None:
    assert isinstance(plan.products, Mapping)
    for pattern in plan.products:
        if not fnmatch.filter(paths, pattern) and (paths or pattern != EVERY):
            cache = any(word in pattern.lower() for word in ("cache", "past_key", "kv"))
            raise UsageError(
                f"QuantPlan(products=) names {pattern!r}, which matches no product outside of MoE blocks and of no "
                f"rewritten one; the products are {listed(paths, 8) or 'none'}" + _NO_CACHE * cache
            )


def _tied(twin: nn.Module, found: Sequence[QuantizedProduct]) -> list[str]:
    """A sentence for each quantised weight of which another module holds the floats."""
    own = {f"{path}.{one.product.weight}" for one in found for path in one.paths}
    places: dict[int, list[str]] = {}
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    told = []
    for one in found:
        others = [n for n in places[id(getattr(one.module, one.product.weight))] if n not in own]
        if others:
            told.append(f"{others[0]}, which has the floats of {one.paths[0]} and keeps them beside the codes")
    return told


def _place(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    for path in paths:
        home, _, name = path.rpartition(".")
        model.get_submodule(home)._modules[name] = module
