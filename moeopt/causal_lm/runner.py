"""An exported causal language model, called as the model was: token ids in, logits and cache out.

Shape legend: B rows, S new tokens, P cached tokens, N positions whose logits are returned, V vocabulary.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from moeopt.cache_names import NAMES, field_named, under_one_name
from moeopt.causal_lm.cache import past_length, read_cache, write_cache
from moeopt.causal_lm.no_ids import check_prompt, checked_ids
from moeopt.errors import UsageError
from moeopt.value_types import PyObject

TAKEN = {"input_ids", "attention_mask", "position_ids", *NAMES, "use_cache", "return_dict", "logits_to_keep"}
_ORIGINAL = "run the original model"
REFUSED = {
    "labels": "the engine computes no loss; take logits from it and compute the loss with torch",
    "inputs_embeds": "the engine starts from token ids; pass input_ids",
    "output_hidden_states": f"the engine returns logits and the cache, no hidden states; {_ORIGINAL} for them",
    "output_attentions": f"the engine returns logits and the cache, no attention weights; {_ORIGINAL} for them",
    "output_router_logits": f"the engine returns logits and the cache, no router logits; {_ORIGINAL} for them",
}
_IGNORED = {"cache_position"}  # what generate passed in transformers before 5: position_ids says the same


class GraphSession(Protocol):
    """What runs a graph: named tensors in, tensors out."""

    @property
    def inputs(self) -> Sequence[str]: ...

    @property
    def outputs(self) -> Sequence[str]: ...

    @property
    def provider(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        """The outputs, in the order of ``outputs``."""
        ...


class CausalLM:
    """Call it as the model was called; ``generate`` is transformers' own, driven by the engine.

    Args:
        session: the graph, loaded; its weights are all that is ever read.
        signature: what :func:`~.causal_lm.export_causal_lm` said.
        check: raises ``UsageError`` for feeds of sizes that the graph does not hold for.
    """

    def __init__(
        self,
        session: GraphSession,
        signature: Mapping[str, Any],
        check: Callable[[Mapping[str, Tensor]], None] = lambda feeds: None,
    ) -> None:
        self.session, self.signature, self._check = session, signature, check
        self._shell: PyObject = None

    @property
    def device(self) -> torch.device:
        """Where logits and cache are."""
        return self.session.device

    @property
    def provider(self) -> str:
        """What runs it: "cpu", "cuda", ..."""
        return self.session.provider

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        found: torch.dtype = getattr(torch, self.signature["logits"]["dtype"])
        return found

    @property
    def config(self) -> PyObject:
        """The model's config, as transformers reads it."""
        return self._generator().config

    @property
    def generation_config(self) -> PyObject:
        """The defaults of :meth:`generate`; assign it or its fields to change them."""
        return self._generator().generation_config

    @generation_config.setter
    def generation_config(self, value: PyObject) -> None:
        self._generator().generation_config = value

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        """What the model's own forward takes: ``input_ids`` (B, S), and optionally ``attention_mask`` (B, P+S),
        ``position_ids`` (B, S), ``past_key_values`` or ``cache``, ``use_cache``, ``return_dict``, ``logits_to_keep``.

        Returns:
            the model's own output class with ``logits`` (B, N, V) and, unless ``use_cache`` is False,
            ``past_key_values`` (``cache`` since transformers 5.24): a ``DynamicCache`` (the one that was passed,
            grown by S), or a list of each layer's tensors, (keys, values) for attention, where transformers is not
            installed.

        Raises:
            UsageError: an argument that the engine has no form for; the message says what to do.
        """
        given = self._bound(args, kwargs)
        ids, cache = given["input_ids"], given.get("past_key_values")
        feeds = self.feeds(**given)
        found = dict(zip(self.session.outputs, self.session.run(feeds), strict=True))
        logits = found[self.signature["logits"]["output"]]
        if "logits_to_keep" not in self.signature["inputs"]:
            logits = logits[:, _kept(given.get("logits_to_keep"), ids.shape[1])]
        use = given.get("use_cache")
        if use or (use is None and self.signature["use_cache"]):
            cached = self.signature["cache"]
            grown = [{part: found[at["output"]] for part, at in layer.items()} for layer in cached]
            return self._result(logits, write_cache(cache, grown), given.get("return_dict"))
        return self._result(logits, None, given.get("return_dict"))

    def feeds(self, **given: PyObject) -> dict[str, Tensor]:
        """The graph's inputs by name for a call of the model by keywords."""
        past = read_cache(given.get("past_key_values"), self.signature["cache"], len(given["input_ids"]), self.device)
        cached = past_length(past)
        if cached and given["input_ids"].shape[1] > 1 and self.signature.get("one_at_a_time"):
            raise UsageError(
                f"{self.signature['architecture']} starts its recurrent states anew where several tokens follow a "
                "cache, the engine would not: pass one token at a time, or the whole sequence without a cache"
            )
        feeds = self._feeds(given, cached)
        for layer, parts in zip(self.signature["cache"], past, strict=True):
            feeds |= {at["input"]: parts[part] for part, at in layer.items()}
        self._check(feeds)
        return feeds

    def can_generate(self) -> bool:
        """True: what ``transformers.pipeline`` asks of a model before it generates with it.

        The pipeline then looks for the class among transformers' own and logs thousands of names when it is none of
        them; for an engine, which is called as the model was, that line is left out.
        """
        log = logging.getLogger("transformers.pipelines.base")
        if _not_an_engine not in log.filters:
            log.addFilter(_not_an_engine)
        return True

    def generate(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        """``GenerationMixin.generate``: greedy, sampling, beams, streamers, stopping criteria and the rest.

        Raises:
            UsageError: transformers is not installed, or the prompt is no ids.
        """
        check_prompt(args, kwargs)
        return self._generator().generate(*args, **kwargs)

    def _generator(self) -> PyObject:
        if self._shell is None:
            from moeopt.causal_lm.generate import shell

            self._shell = shell(self)
        return self._shell

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = self.signature["parameters"]
        if len(args) > len(names):
            raise UsageError(f"the model takes {len(names)} arguments by position, not {len(args)}")
        given = dict(zip(names, args, strict=False))
        if twice := sorted(given.keys() & kwargs.keys()):
            raise UsageError(f"{twice[0]} was given twice, by position and by name")
        given = under_one_name({**given, **kwargs})
        for name, value in given.items():
            if value is None or value is False or name in TAKEN or name in _IGNORED:
                continue
            takes = ", ".join(sorted(TAKEN.intersection(self.signature["parameters"])))
            unknown = f"the engine was exported without it; {_ORIGINAL}, or leave it out: the engine takes {takes}"
            raise UsageError(f"{name}: {REFUSED.get(name, unknown)}")
        ids = checked_ids(given.get("input_ids"))
        if ids.dtype not in (torch.int64, torch.int32):
            raise UsageError(f"input_ids must be int64 or int32, not {str(ids.dtype).removeprefix('torch.')}")
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= self.signature["vocab_size"]:
            wrong = least if least < 0 else most
            raise UsageError(f"input_ids holds {wrong}, and the vocabulary has 0 to {self.signature['vocab_size'] - 1}")
        return given

    def _feeds(self, given: dict[str, Any], past: int) -> dict[str, Tensor]:
        ids = given["input_ids"]
        rows, new = ids.shape
        mask, position = given.get("attention_mask"), given.get("position_ids")
        if mask is None and isinstance(position, Tensor) and self._packed(given, position):
            raise UsageError(
                "position_ids start anew within a row: without attention_mask and cache the model reads that as "
                "several sequences in one row, which the engine does not; give each sequence a row of its own"
            )
        if mask is None:
            mask = torch.ones(rows, past + new, dtype=torch.int64)
        elif not isinstance(mask, Tensor) or tuple(mask.shape) != (rows, past + new):
            was = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UsageError(
                f"attention_mask must be ({rows}, {past + new}): one entry for each cached and each new token, "
                f"not {was}"
            )
        elif bool(((mask != 0) & (mask != 1)).any()):
            raise UsageError("attention_mask must hold zeros and ones: other weights of tokens are not in the engine")
        if position is None:
            position = torch.arange(past, past + new).expand(rows, new)
        elif not isinstance(position, Tensor) or position.is_floating_point():
            was = str(position.dtype) if isinstance(position, Tensor) else type(position).__name__
            raise UsageError(f"position_ids must be a tensor of whole numbers, not {was.removeprefix('torch.')}")
        elif position.dim() != 2 or position.shape[-1] != new or position.shape[0] not in (1, rows):
            raise UsageError(f"position_ids must be ({rows}, {new}), not {tuple(position.shape)}")
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position.expand(rows, new),
            "logits_to_keep": _kept(given.get("logits_to_keep"), new),
        }
        wanted = self.signature["inputs"]
        return {at["input"]: values[name].to(getattr(torch, at["dtype"])) for name, at in wanted.items()}

    def _packed(self, given: dict[str, Any], position: Tensor) -> bool:
        """Whether the model would see several sequences in a row: it looks for them only where there is no cache."""
        use = given.get("use_cache")
        cached = given.get("past_key_values") is not None or (self.signature["use_cache"] if use is None else use)
        return not cached and position.dim() == 2 and bool((position.diff(dim=-1) != 1).any())

    def result(self, logits: Tensor, return_dict: bool | None = None) -> PyObject:
        """``logits`` (B, N, V) as a call without a cache returns them."""
        return self._result(logits, None, return_dict)

    def _result(self, logits: Tensor, cache: PyObject, return_dict: bool | None) -> PyObject:
        if return_dict is False:
            return (logits,) if cache is None else (logits, cache)
        kind = _output_class(*self.signature["output_class"])
        return kind(**{"logits": logits} if cache is None else {"logits": logits, field_named(kind): cache})

    def __repr__(self) -> str:
        return f"<moeopt engine of {self.signature['architecture']} on {self.provider}>"


def _not_an_engine(record: logging.LogRecord) -> bool:
    """False for the line of ``transformers.pipeline`` that says that an engine's class is not one of its models."""
    return not re.match(r"The model '(Optimized|OnnxEngine|TensorRTEngine|CausalLM)' is not supported", str(record.msg))


def _kept(wanted: PyObject, new: int) -> Tensor:
    """Positions of ``logits_to_keep``, read as the model reads it: a number counts from the end (0 and None keep all),
    and anything else is an index of the positions.

    Raises:
        UsageError: it is no index of ``new`` positions.
    """
    if wanted is None or isinstance(wanted, int):
        wanted = slice(-(wanted or 0), None)
    try:
        kept = torch.arange(new)[wanted if isinstance(wanted, slice) else torch.as_tensor(wanted).cpu()]
    except (IndexError, TypeError, ValueError, RuntimeError):
        kept = torch.empty(0)
    if kept.dim() != 1 or not kept.numel():
        raise UsageError(f"logits_to_keep = {wanted!r:.80} picks no list of positions among {new} tokens")
    return kept


def _output_class(module: str, name: str) -> PyObject:
    """The model's own output class if it is one of transformers'; else a plain one with attributes."""
    if module.split(".")[0] == "transformers":
        try:
            from transformers.utils import ModelOutput

            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and issubclass(found, ModelOutput):
                return found
        except ImportError:
            pass
    return lambda **fields: SimpleNamespace(**{"past_key_values": None, **fields})
