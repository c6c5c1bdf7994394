"""A cluster on paper: which expert lies on which device, what fits, what is sent, and where expert parallelism pays.

Nothing is run, and no device is needed: the figures are counts and bounds.
"""

from __future__ import annotations

from moeopt.planning.result import ClusterPlan
from moeopt.planning.run import plan

__all__ = ["ClusterPlan", "plan"]
