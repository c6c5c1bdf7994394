"""``generate`` of an engine: the model's own class without any of its modules, whose forward is the engine.

``transformers`` decides everything about generation from the class, the config and the signature of
``forward``; weights are never asked for, and here there are none.
"""

from __future__ import annotations

from typing import Any

import torch

from moeopt.errors import UsageError
from moeopt.value_types import PyObject


def shell(engine: PyObject) -> PyObject:
    """A ``PreTrainedModel`` with no parameters that generates by calling ``engine``.

    Raises:
        UsageError: transformers is not installed.
    """
    try:
        import transformers
        from transformers import CONFIG_MAPPING, GenerationConfig, GenerationMixin, PreTrainedModel
    except ImportError:
        raise UsageError("generate needs transformers: pip install 'moeopt[transformers]'") from None
    signature = engine.signature
    kind = signature["model_type"]
    config_class = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else transformers.PretrainedConfig  # noqa: SIM401 - its get finds nothing
    config = config_class.from_dict(_decoded(signature["config"]))
    if signature.get("own_generation"):
        raise UsageError(
            f"the class {signature['architecture']} defines {', '.join(signature['own_generation'])}, which the engine "
            "does not carry, so generate could give other tokens: call the engine in a loop of your own, or generate "
            "with the original model"
        )
    own = None if signature.get("own_class") else getattr(transformers, signature["architecture"], None)
    known = isinstance(own, type) and issubclass(own, PreTrainedModel) and issubclass(own, GenerationMixin)
    bases: tuple[Any, ...] = (own,) if known else (PreTrainedModel, GenerationMixin)

    def init(self: PyObject) -> None:
        PreTrainedModel.__init__(self, config)
        self.generation_config = GenerationConfig.from_dict(_decoded(signature["generation_config"]))
        self.eval()

    body = {
        "__init__": init,
        "forward": _forward_of(engine),
        "__module__": __name__,
        "device": property(lambda self: engine.device),
        "dtype": property(lambda self: engine.dtype),
    }
    return type(signature["architecture"], bases, body)()


def _forward_of(engine: PyObject) -> PyObject:
    """The ``forward`` of a model whose results are the engine's; ``generate`` reads its parameters' names."""

    def forward(
        self: PyObject,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: PyObject = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: PyObject = 0,
        tokenizer: PyObject = None,  # generate hands what stop_strings and assisted decoding need on to forward, unread
        assistant_tokenizer: PyObject = None,
        cache: PyObject = None,
        **kwargs: PyObject,
    ) -> PyObject:
        return engine(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    return forward


def _decoded(value: PyObject) -> PyObject:
    """A config's JSON with the numbers that JSON has not: transformers writes ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
