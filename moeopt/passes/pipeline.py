"""THE order of the passes, as a value; each name is also what ``skip_passes=`` and ``only_passes=`` take."""

from __future__ import annotations

from moeopt.passes.base import Pass
from moeopt.passes.drop_copies import DropCopies
from moeopt.passes.fold_expert_scale import FoldExpertScale
from moeopt.passes.fuse_dense_ffn import FuseDenseFFN
from moeopt.passes.group_experts import GroupExperts
from moeopt.passes.merge_shared_expert import MergeSharedExpert
from moeopt.passes.quantize_experts import QuantizeExperts
from moeopt.passes.read_codes import ReadCodes
from moeopt.passes.shrink_router_softmax import ShrinkRouterSoftmax
from moeopt.passes.split_dense_ffn import SplitDenseFFN

PIPELINE: tuple[Pass, ...] = (
    GroupExperts(),  # first: makes the graph that every later pass speaks of
    SplitDenseFFN(),  # makes the graph of a dense FFN, where dense="split" asks for groups
    FuseDenseFFN(),  # makes the graph of a dense FFN, where dense="fuse" and the fused form is measured to be quicker
    DropCopies(),  # before patterns are looked for: a copy or an idle view may stand in the middle of one
    MergeSharedExpert(),  # before a factor on the routed sum alone is folded away
    FoldExpertScale(),  # after copies are gone that would stand between the sum and its factor
    ShrinkRouterSoftmax(),  # after the experts are one op: nothing else looks at routers
    ReadCodes(),  # after every pass that moves an expert: the function stays, what reads its weights changes
    QuantizeExperts(),  # last: another function from here on; off unless quantize= gives it a plan
)
