"""Expert load: what the user's own data does to every MoE block, in exact counts."""

from moeopt.profiling.result import LayerLoad, LoadProfile
from moeopt.profiling.run import profile

__all__ = ["LayerLoad", "LoadProfile", "profile"]
