"""THE order of the passes, as a value; each name is also what ``skip_passes=`` and ``only_passes=`` take."""

from __future__ import annotations

from moeopt.passes.base import Pass
from moeopt.passes.fuse_dense import FuseDenseFFN
from moeopt.passes.group_experts import GroupExperts
from moeopt.passes.split_dense import SplitDenseFFN

PIPELINE: tuple[Pass, ...] = (
    GroupExperts(),  # first: makes the graph that every later pass speaks of
    SplitDenseFFN(),  # makes the graph of a dense FFN, where dense="split" asks for groups
    FuseDenseFFN(),  # makes the graph of a dense FFN, where dense="fuse" and the fused form is measured to be quicker
)
