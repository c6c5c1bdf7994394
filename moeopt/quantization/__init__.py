"""Experts and other products in fewer bits: calibration, the model with codes in it, and what quantising lost."""
