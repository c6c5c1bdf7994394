"""A model's checkpoint directory, opened without being loaded, and optimised layer by layer."""
