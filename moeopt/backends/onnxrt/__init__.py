"""ONNX Runtime: whole-graph export, expert lowerings for each provider, and engines that check themselves."""
