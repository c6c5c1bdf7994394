"""Before anything is optimised: what is in a model, whether it fits, and what bounds it."""

from moeopt.inspection.result import Inspection
from moeopt.inspection.run import inspect

__all__ = ["Inspection", "inspect"]
