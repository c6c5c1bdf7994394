"""The backends: one runtime a package, each importing its runtime inside its own functions."""

if __name__ != "moeopt.backends":
    raise ImportError(
        "the folder `backends` at the root is a symlink for readers, not a package: "
        f"import moeopt.backends, not {__name__}"
    )
