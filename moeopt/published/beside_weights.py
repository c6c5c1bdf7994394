"""What a checkpoint's quantization_config asks for beside the weights: activations that are rounded or turned.

Files of weights do not hold these: whoever runs the model does them at each call. A reader of weights alone has to say
so, or to leave the model alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moeopt.listed import listed

_IN_WEIGHTS = ("weight_input", "weight_output")
"""Where compressed-tensors multiplies a transform into the weights before they are saved."""
_WEIGHTS_ALONE = re.compile(r"A16|WO$")
"""In the name of an algorithm of modelopt (W4A16_AWQ, FP8_PB_WO) that leaves activations as they are."""


def turned_at_each_call(config: Mapping[str, Any]) -> str:
    """Which transforms of activations a model needs at each call, in words; "" where it needs none.

    compressed-tensors saves weights that were turned (by a Hadamard matrix), and the model turns what they read at each
    call; the weights alone are those of another function.
    """
    transforms = config.get("transform_config")
    groups = transforms.get("config_groups") if isinstance(transforms, Mapping) else None
    found = [
        f"{name} ({apply.get('location')})"
        for name, group in (groups.items() if isinstance(groups, Mapping) else ())
        for apply in _entries(group, "apply")
        if apply.get("location") not in _IN_WEIGHTS
    ]
    return listed(found)


def rounded_at_each_call(config: Mapping[str, Any]) -> str:
    """How what quantised products read is rounded where a kernel does it, in words; "" where it is not."""
    scheme = config.get("activation_scheme")
    if config.get("quant_method") == "fp8" and scheme in ("dynamic", "static"):
        return f"activation_scheme {scheme!r}"
    if config.get("quant_method") == "fbgemm_fp8":
        return "fbgemm_fp8"
    algorithm = str(config.get("quant_algo") or "")
    if config.get("quant_method") == "modelopt" and algorithm and not _WEIGHTS_ALONE.search(algorithm):
        return f"quant_algo {algorithm!r}"
    whole_model = config.get("global_quant_config")
    if isinstance(whole_model, Mapping) and isinstance(whole_model.get("input_tensors"), Mapping):
        return f"input_tensors of {whole_model['input_tensors'].get('dtype', '8 bits')}"
    groups = config.get("config_groups")
    held = groups.values() if isinstance(groups, Mapping) else ()
    rounded = [g.get("input_activations") for g in held if isinstance(g, Mapping)]
    bits = sorted({str(r.get("num_bits", 8)) for r in rounded if isinstance(r, Mapping)})
    return f"input_activations of {listed(bits)} bits" if bits else ""


def _entries(group: object, key: str) -> Iterator[Mapping[str, Any]]:
    found = group.get(key) if isinstance(group, Mapping) else None
    yield from (e for e in (found if isinstance(found, list) else [found]) if isinstance(e, Mapping))
