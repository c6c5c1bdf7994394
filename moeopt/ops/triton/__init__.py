"""The experts op on a GPU, in Triton: separate or stacked weights where they lie, and no wait for the host.

Nothing here imports ``triton`` before :func:`moeopt.ops.triton.library.kernels` is asked for it.
"""
