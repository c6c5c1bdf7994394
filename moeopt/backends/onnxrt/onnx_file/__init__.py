"""An ONNX file optimised: its regions rewritten as modules are, lowered, and stitched into the same graph."""
