"""Lowerings of the grouped-expert op: one file each, all with the shape of :class:`~.base.Lowering`."""
