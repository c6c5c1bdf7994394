"""The strategies: random programs inside the two ops, and outside them.

Nothing here knows how a program is recognised; only which choices mean something together.
Choices are listed simplest first, so that a failing program shrinks towards ``all_where`` over relu experts.
"""

from typing import Any

from hypothesis import strategies as st

from tests.property import experts, forms, routers
from tests.property.spec import Around, Expert, Layout, Program, Router

PACKED = ("gate|up", "up|gate", "interleaved", "interleaved_up")


def one_of(draw: st.DrawFn, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def maybe(draw: st.DrawFn, tenths: int) -> bool:
    """True in about so many of ten draws; False is the simpler one."""
    return draw(st.integers(0, 9)) >= 10 - tenths


@st.composite
def expert_functions(draw: st.DrawFn, zero_at_zero: bool) -> Expert:
    gated = maybe(draw, 5)
    names = list(experts.ACTIVATIONS)
    if zero_at_zero and not gated:
        names = [n for n in names if n not in ("sigmoid", "softplus")]
    return Expert(
        gated=gated,
        activation=one_of(draw, *names),
        clamp=one_of(draw, "gate", "both", "after") if gated and maybe(draw, 3) else "",
        up_offset=one_of(draw, 1.0) if gated and maybe(draw, 2) and not zero_at_zero else 0.0,
        bias_in=maybe(draw, 4) and not zero_at_zero,
        bias_out=maybe(draw, 4) and not zero_at_zero,
    )


@st.composite
def layouts(draw: st.DrawFn, stacked: bool, gated: bool) -> Layout:
    kind = (
        one_of(draw, "stacked", "flat")
        if stacked
        else one_of(draw, "list", "stacked", "dict", "parameter_list", "flat")
    )
    rows = one_of(draw, "gate|up", "separate", *PACKED[1:]) if gated else "gate|up"
    if kind in ("list", "dict"):
        return Layout(kind, rows)
    orientations = one_of(draw, "oi", "io"), one_of(draw, "oi", "io")
    return Layout(kind, rows, *orientations, matmul=one_of(draw, "linear", "at", "einsum"))


@st.composite
def routings(draw: st.DrawFn, num_experts: int, top_k: int, dtype: str) -> Router:
    kinds = [k for k in routers.KINDS if k not in routers.DENSE and (top_k == 1 or k not in routers.TOP_1)]
    kind = one_of(draw, *kinds)
    groups, score, fill = 1, "max", "-inf"
    if kind in routers.GROUP_LIMITED and num_experts % 2 == 0 and maybe(draw, 4):
        groups = one_of(draw, *(g for g in (2, 4) if num_experts % g == 0 and num_experts // g > 1 or g == 2))
        size, kept = num_experts // groups, max(1, groups // 2)
        if size * kept < top_k:
            groups = 1
        score = "top2" if size > 1 and maybe(draw, 5) else "max"
        fill = one_of(draw, "-inf", "zero")
    own = kind not in ("given",)
    return Router(
        kind,
        renormalize=one_of(draw, "", "", "sum", "sum+1e-20", "sum+1e-6", "max1e-12"),
        scale=one_of(draw, 2.5, 0.5) if maybe(draw, 2) else 1.0,
        per_expert_scale=maybe(draw, 1),
        bias=own and maybe(draw, 3),
        float32=own and (dtype != "float32" or maybe(draw, 2)),
        keep_float32=dtype != "float32" and maybe(draw, 5),
        groups=groups,
        group_score=score if groups > 1 else "max",
        group_fill=fill if groups > 1 else "-inf",
    )


@st.composite
def surroundings(draw: st.DrawFn, any_rank: bool, stackable: bool) -> Around:
    rank = one_of(draw, 2, 3)
    around = Around(
        shared=one_of(draw, "added", "gated", "twin") if maybe(draw, 3) else "",
        out_scale=0.7 if maybe(draw, 2) else 1.0,
        residual=maybe(draw, 3),
        norm=one_of(draw, "rms", "layer") if maybe(draw, 3) else "",
        aux=one_of(draw, "tuple", "dict") if maybe(draw, 3) else "",
        rank=rank,
        flatten=rank == 2 or not any_rank or not maybe(draw, 5),
    )
    if stackable and not around.aux and maybe(draw, 1):
        return Around(**{**vars(around), "layers": 2})
    return around


SIZES = ((8, 12), (8, 8), (16, 8), (8, 16), (6, 20), (24, 10), (4, 4))
FORMS = (*forms.SPARSE, *forms.DENSE)


@st.composite
def inside_programs(draw: st.DrawFn, form: str) -> Program:
    """A program of one written form that the two ops can say: it must be rewritten."""
    dense = form in forms.DENSE
    num_experts = one_of(draw, 4, 2, 3, 5, 6, 8)
    dtype = "bfloat16" if maybe(draw, 1) else "float32"
    all_weighted = dense and maybe(draw, 4)
    top_k = num_experts if all_weighted else draw(st.integers(1, num_experts))
    # slot_where adds a bare zero per slot and expert; with the weight inside the experts and more slots than one,
    # an expert runs once per slot on other rows, which no single sum says (AMBIGUOUS in test_programs.py).
    weighs_outputs = form in ("take_outputs", "stack_dense", "stack_einsum") or (form == "slot_where" and top_k > 1)
    on_input = not weighs_outputs and maybe(draw, 2)
    expert = draw(expert_functions(zero_at_zero=on_input and (dense or form in forms.ALL_ROWS)))
    if all_weighted:
        router = Router(one_of(draw, *routers.DENSE), bias=maybe(draw, 3), float32=dtype != "float32")
    else:
        router = draw(routings(num_experts, top_k, dtype))
    # With more experts than features, some logit may be the largest nowhere: nobody could reach that expert.
    sizes = [(h, i) for h, i in SIZES if h >= num_experts or router.kind in ("given", "hash")]
    hidden, inner = one_of(draw, *sizes)
    given_more = router.kind in ("given", "hash")
    return Program(
        form=form,
        experts=num_experts,
        top_k=top_k,
        hidden=hidden,
        inner=inner,
        router=router,
        expert=expert,
        layout=draw(layouts(form in forms.STACKED, expert.gated)),
        around=draw(surroundings(form in forms.ANY_RANK and not given_more, not given_more and dtype == "float32")),
        weight_on="input" if on_input else "output",
        dtype=dtype,
        seed=draw(st.integers(0, 10_000)),
    )


@st.composite
def outside_programs(draw: st.DrawFn, kind: str) -> Program:
    """A program of one kind that the two ops cannot say: it must be declined (a kind in ``outside.OPEN`` may be)."""
    num_experts = one_of(draw, 4, 2, 3, 6)
    gated = maybe(draw, 4)
    return Program(
        experts=num_experts,
        top_k=draw(st.integers(1, min(3, num_experts))),
        hidden=one_of(draw, 8, 16),
        inner=one_of(draw, 12, 8, 16),
        expert=Expert(gated, one_of(draw, "relu", "silu", "gelu"), bias_in=maybe(draw, 5), bias_out=maybe(draw, 5)),
        layout=Layout(rows=one_of(draw, "gate|up", "separate") if gated else "gate|up"),
        around=Around(rank=one_of(draw, 2, 3)),
        seed=draw(st.integers(0, 10_000)),
        outside=kind,
    )
