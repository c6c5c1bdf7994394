"""Hostile bundles made by hand, as changes to two good ones whose manifests are made to agree with them again.

Each is a name, the good bundle that it starts from, and a change of its directory. None may be taken for good.
"""

from tests.hostile import made_manifests, made_onnx, made_torch
from tests.hostile.edits import Made


def made() -> list[Made]:
    """All of them."""
    return [*made_manifests.made(), *made_torch.made(), *made_onnx.made()]
