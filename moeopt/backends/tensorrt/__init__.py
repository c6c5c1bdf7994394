"""TensorRT and TensorRT for RTX: engines built ahead of time for one compute capability."""
