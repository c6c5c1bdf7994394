"""Tiny, seeded models of real MoE families, built from their own code in the transformers library."""

from tests.families.build import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
