"""Quantised checkpoints as they are published: read without being expanded, and compared with what was loaded."""
