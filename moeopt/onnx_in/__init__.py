"""ONNX files read: checked, searched for regions that may be experts, and run as ATen by an interpreter."""
