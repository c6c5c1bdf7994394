"""What stops a call of a rewritten block, so that the block's own code answers it."""


class Stale(Exception):
    """The module no longer is what was verified; the message says what changed."""
