"""The torch backend: PyTorch itself runs the rewritten model."""
