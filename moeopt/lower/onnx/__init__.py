"""A rewritten model as an ONNX graph, before a runtime is chosen: export, sites, and what lowerings are made of."""
