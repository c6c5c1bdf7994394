"""What each ONNX operator is in torch, a table a file."""
