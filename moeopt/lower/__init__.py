"""A rewritten model on its way to a runtime: the exported program, its signature, the ONNX graph."""
