"""The passes: one optimisation a file; their order is a value in ``moeopt/pipeline.py``."""

if __name__ != "moeopt.passes":
    raise ImportError(
        f"the folder `passes` at the root is a symlink for readers, not a package: import moeopt.passes, not {__name__}"
    )
