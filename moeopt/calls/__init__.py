"""What the public calls do, by what they are given: a module, a directory, an ONNX file, an optimised model."""
