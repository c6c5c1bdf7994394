"""Where the experts' sum stood there is one op, in the shape and at the place of the sum."""

import pytest
import torch

from moeopt.recognise.experts import recognize
from moeopt.rewrite.kept_steps import KeptSteps, StepRef
from moeopt.rewrite.replace_experts import experts_rewrite
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, ffn, tape_of


class Sequence(MoE):
    def forward(self, x):
        return super().forward(x.reshape(-1, H)).view_as(x)


class Map(MoE):
    """Channels first: features on axis 1 at both ends."""

    def forward(self, x):
        w, ids = self.route(x.permute(0, 2, 1).reshape(-1, H))
        full = torch.zeros(len(w), 4).scatter(1, ids, w).view(x.shape[0], -1, 4)
        outs = [f(x.transpose(1, 2)).transpose(1, 2) for f in self.experts]
        return sum(full[..., e][:, None] * o for e, o in enumerate(outs))


class Added(MoE):
    def __init__(self):
        super().__init__(shared=ffn(inner=20))

    def mix(self, x, w, ids):
        y = self.shared(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = y.index_add(0, t, expert(x[t]) * w[t, k, None])
        return y


class Soft(MoE):
    def mix(self, x, w, ids):
        p = self.router(x).softmax(-1)
        return sum(p[:, e, None] * f(x) for e, f in enumerate(self.experts))


@pytest.mark.parametrize(
    ("make", "shape", "ops"),
    [
        (MoE, (24, H), []),
        (Sequence, (3, 8, H), []),
        (Map, (3, H, 8), ["movedim", "reshape", "reshape", "movedim"]),
        (Added, (24, H), ["add"]),
        (Soft, (24, H), ["table_to_ids"]),
    ],
)
def test_the_op_and_what_it_needs_around_it(make, shape, ops):
    (found,) = recognize(tape_of(make, rand(*shape, seed=7)))
    change = experts_rewrite(found, 3)
    assert change.node is found.combine.node and change.interior is found.interior
    assert found.tokens.node in change.needs and (found.base in change.needs) == (make is Added)
    plan = KeptSteps([], None, [], {}, [])
    given = {n: plan.call(f"needs {n}") for n in change.needs}
    result = change.apply(plan, given.__getitem__)
    steps = plan.steps[len(given) :]
    (op,) = [s for s in steps if s.kind == "experts"]
    assert op.target == 3 and all(isinstance(a, StepRef) for a in op.args) and op.source == found.source
    names = [s.target.__name__.split(".")[0] for s in steps if s.kind == "call"]
    assert [n for n in names if n in ("movedim", "add", "table_to_ids") or make is Map and n == "reshape"][
        : len(ops)
    ] == ops
    assert result == StepRef(len(plan.steps) - 1)
