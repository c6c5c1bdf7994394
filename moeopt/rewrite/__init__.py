"""A match becomes a program that runs in the block's place, with guards, on the model's own weights."""
