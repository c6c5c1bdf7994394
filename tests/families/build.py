"""How a family becomes a model: tiny config, seeded weights, and nothing left at zero or one."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.families.configs import CONFIGS, VOCAB


@functools.cache
def library_version() -> tuple[int, ...]:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        name: the model type in transformers.
        config: the fields of its tiny config.
        moe_blocks: MoE call sites of one forward.
        experts: routed experts of each.
        min_version: first (major, minor) of transformers that can build it here.
        auto: the Auto class that builds it.
        implementations: whether ``experts_implementation`` chooses its expert code (transformers 5).
    """

    name: str
    config: dict[str, Any]
    moe_blocks: int
    experts: int
    min_version: tuple[int, int] = (4, 57)
    auto: str = "AutoModelForCausalLM"
    implementations: bool = True

    @property
    def available(self) -> bool:
        return library_version() >= self.min_version

    @property
    def seq2seq(self) -> bool:
        return self.auto == "AutoModelForSeq2SeqLM"

    @property
    def implementation_names(self) -> tuple[str | None, ...]:
        """What ``build`` accepts; only None where the library gives no choice."""
        chosen = self.implementations and library_version() >= (5, 0)
        return ("eager", "grouped_mm", "batched_mm") if chosen else (None,)

    def build(self, experts_implementation: str | None = None) -> nn.Module:
        """The model in eval mode, float32; the same weights for every implementation."""
        import transformers

        config = transformers.AutoConfig.for_model(self.name, **self.config)
        if experts_implementation is not None:
            config._experts_implementation = experts_implementation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.auto).from_config(config).eval()
            _enliven(model)
        return model

    def inputs(self, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
        """Token ids, and decoder token ids where there is a decoder of its own."""
        g = torch.Generator().manual_seed(seed)
        out = {"input_ids": torch.randint(3, VOCAB - 1, (batch, length), generator=g)}
        if self.seq2seq:
            out["decoder_input_ids"] = torch.randint(3, VOCAB - 1, (batch, length - 2), generator=g)
        return out

    def generate(self, model: Any, new_tokens: int = 8) -> torch.Tensor:
        """Greedy tokens; no pair of tokens repeats, so that a tiny random model does not stick to one."""
        prompt = self.inputs()["input_ids"]
        return model.generate(
            prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, no_repeat_ngram_size=2
        )


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Moves each constant tensor (biases, norms, correction biases) off its constant; widens the routers."""
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if not t.is_floating_point() or t.numel() < 2 or "inv_freq" in name:
            continue
        if (t == t.flatten()[0]).all():
            t.add_(torch.randn_like(t) * 0.1)


FAMILIES: dict[str, Family] = {name: Family(name, **fields) for name, fields in CONFIGS.items()}
