"""Checkpoints as they are published: what their files hold; quantised ones are read unexpanded, and compared."""
