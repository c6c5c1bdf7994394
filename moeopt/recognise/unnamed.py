"""A reason that names what it saw, and not the obstacle."""

from __future__ import annotations

from moeopt.errors import Declined


class Unnamed(Declined):
    """No experts were found, and what stands between is told at most by its ops."""
