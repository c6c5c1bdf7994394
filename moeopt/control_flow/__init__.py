"""What a model's Python code decides by: its conditions, which way they went, and the sizes and numbers they read."""
