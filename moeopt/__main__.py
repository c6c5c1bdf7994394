"""``python -m moeopt``: the same as the ``moeopt`` command."""

from moeopt.cli import main

if __name__ == "__main__":
    main()
