"""Causal language models as one ONNX graph: key/value caches, recurrent states, and ``generate``."""
