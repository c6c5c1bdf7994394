"""The forms in which a model comes in and goes out."""
