"""The zoo: MoE models the way people write them, with no import of the compiler under test."""

import importlib
import pkgutil

from tests.zoo.case import CASES, ZooCase

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("test_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["CASES", "ZooCase"]
