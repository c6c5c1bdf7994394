"""The strategies of wide programs: a program of ``programs.py`` with surroundings, scores, dtypes, configurations and
example inputs that its own strategies leave out.

A wide program may be declined, with a reason; its numbers must be right on all calls of ``unlike.py``.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from tests.property import configs, forms, routers, scores, surroundings, unlike
from tests.property.programs import FORMS, inside_programs, maybe, one_of, outside_programs
from tests.property.spec import Program, Router

NEAR_ONE = (0.999995, 1.000005)
EPSILONS = ("sum+1e-9", "sum+1e-20", "sum", "sum+1e-6", "")
QUICK_FORMS = ("all_where", "hit_loop", "bool_mask", "dense_loop", "gather", "bmm_dense", "slot_loop")
ENGINE_FORMS = tuple(f for f in FORMS if f in QUICK_FORMS)
"""Forms that exporters take; the others are left to the tests on backend torch."""


@st.composite
def scored_routers(draw: st.DrawFn, router: Router, copied: bool) -> Router:
    """Another score function in the place of the router's own."""
    if maybe(draw, 1):
        return replace(router, kind="position_by_division", groups=1, float32=False)
    kind = one_of(draw, "score_topk", "score_topk", "topk_score", "score_bias_topk")
    linear = copied or maybe(draw, 3)
    return replace(
        router,
        kind=kind,
        score=one_of(draw, *scores.SCORES),
        gain=one_of(draw, 1.0, 1.0, 1.0, 8.0),
        softcap=one_of(draw, 0.0, 0.0, 0.0, 30.0),
        linear=linear,
        copied=copied,
        float32=router.float32 and not linear,
        renormalize=one_of(draw, *EPSILONS),
        groups=router.groups if kind in ("score_topk", "score_bias_topk") else 1,
    )


@st.composite
def wide_programs(draw: st.DrawFn, forms_taken: tuple[str, ...] = FORMS) -> Program:
    """One wide program, of any of the written forms, or with a capacity."""
    if maybe(draw, 1) and maybe(draw, 5):
        return draw(outside_programs("capacity"))
    form = one_of(draw, *forms_taken)
    p = draw(inside_programs(form))
    r, a = p.router, p.around
    dtype = one_of(draw, "float32", "float32", "float32", "bfloat16", "float16", "float64")
    if p.around.layers > 1 or r.kind in routers.DENSE:
        return replace(p, dtype=p.dtype if r.kind in routers.DENSE else "float32")
    scored = maybe(draw, 7)
    if r.kind in ("given", "hash") and not scored:
        return replace(p, dtype=dtype)
    if scored:
        r = draw(scored_routers(r, copied=maybe(draw, 1) and p.experts > p.top_k))
    extra = one_of(draw, "", "mask", "near one", "config") if maybe(draw, 6) else ""
    scale = one_of(draw, 1.0, *NEAR_ONE, 2.5) if maybe(draw, 3) else r.scale
    around = replace(
        a,
        aux="tuple" if a.aux else "",
        norm=one_of(draw, *surroundings.NORMS) if maybe(draw, 4) else a.norm,
        softcap=one_of(draw, 30.0, 2.0) if maybe(draw, 2) else 0.0,
        shared="gated" if maybe(draw, 2) else a.shared,
        near_one=one_of(draw, *NEAR_ONE) if extra == "near one" and dtype in ("float32", "float64") else 0.0,
        mask=one_of(draw, "absent", "given") if extra == "mask" else "",
    )
    configured = extra == "config" and r.kind not in routers.TOP_1 and form in forms.SPARSE
    return replace(
        p,
        dtype=dtype,
        router=replace(r, scale=scale),
        around=around,
        config=one_of(draw, *configs.KINDS) if configured else "",
        example=one_of(draw, *unlike.MEMORY) if maybe(draw, 4) else "contiguous",
    )


def engine_programs() -> st.SearchStrategy[Program]:
    return wide_programs(ENGINE_FORMS)


def config_programs() -> st.SearchStrategy[Program]:
    return wide_programs(tuple(forms.SPARSE)).filter(lambda p: bool(p.config))
