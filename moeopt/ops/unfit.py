"""How a fast kernel says that a call is not for it, so that the next one is tried."""


class Unfit(Exception):
    """This call is not for the kernel; the message says what stands in the way. Nothing was computed."""
