"""Fast kernels of the ops, one file per device."""
