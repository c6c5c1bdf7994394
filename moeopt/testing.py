"""Equivalence as a test: what a certificate measures, as an assertion whose text has the numbers.

    from moeopt.testing import assert_equivalent

    assert_equivalent(model, moeopt.optimize(model, x), x)

It needs no pytest. With pytest, the fixture ``assert_equivalent`` is the same and writes the figures into the
JUnit report as well (``moeopt.pytest_plugin``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from moeopt import api
from moeopt.backends import registry
from moeopt.bundle.manifest import read_manifest
from moeopt.errors import UsageError
from moeopt.find.example_inputs import as_call
from moeopt.limits import LoadLimits
from moeopt.rewrite.install import rewritten_forward
from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.first_difference import first_difference
from moeopt.verification.judge import FACTOR
from moeopt.verification.model import end_to_end
from moeopt.verification.module_pair import check_blocks, differing_blocks
from moeopt.verification.regression import Regression, current, read_certificate, regressions


def assert_equivalent(
    original: nn.Module,
    optimized: PyObject,
    inputs: PyObject,
    *,
    blocks: Sequence[str] | None = None,
    verify: Literal["strict", "fast"] = "strict",
    seed: int = 0,
) -> Certificate:
    """Fail unless ``optimized`` computes what ``original`` does; the certificate otherwise.

    Args:
        original: the model as it was written, in the mode in which it is used.
        optimized: a :class:`moeopt.Optimized`, a loaded engine, a bundle's directory, or any ``nn.Module`` that is
            called alike.
        inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
        blocks: names of submodules that are compared one by one with a float64 oracle, on these inputs and on
            adversarial routing. None means those that moeopt rewrote, and of plain modules the outermost ones
            whose class differs and the first that hold other weights; ``()`` leaves the end-to-end comparison only.
            An engine is one graph and has none.
        verify: ``strict`` runs all cases, ``fast`` three and the given inputs.
        seed: of the random cases.

    Raises:
        AssertionError: they differ. The text names the block, the distance, the budget, and the tolerance that
            would be required.
        UsageError: the original was itself optimised, or the inputs or names are of the wrong kind.
    """
    certificate = compare(original, optimized, inputs, blocks=blocks, verify=verify, seed=seed)
    if certificate.passed is not True:
        raise AssertionError(failure_text(certificate))
    return certificate


def compare(
    original: nn.Module,
    optimized: PyObject,
    inputs: PyObject,
    *,
    blocks: Sequence[str] | None = None,
    verify: Literal["strict", "fast"] = "strict",
    seed: int = 0,
) -> Certificate:
    """What :func:`assert_equivalent` judges by; arguments as there, and never an ``AssertionError``."""
    if not isinstance(original, nn.Module) or isinstance(original, api.Optimized):
        raise UsageError(f"original is a {type(original).__name__}; give the nn.Module as it was before")
    if any(rewritten_forward(module) is not None for module in original.modules()):
        raise UsageError(
            "the original was itself optimised (inplace=True?), so a comparison with it proves nothing: give a model "
            "that moeopt did not change"
        )
    if isinstance(optimized, str | os.PathLike):
        return api.verify(optimized, original=original, inputs=inputs)
    manifest = getattr(optimized, "manifest", None)
    if manifest is not None and not isinstance(optimized, nn.Module | api.Optimized):
        provider = registry.get(manifest.backend).runs_on(optimized)
        return api.verify(manifest.directory, original=original, inputs=inputs, provider=provider)
    call = as_call(inputs)
    model = optimized.model if isinstance(optimized, api.Optimized) else optimized
    if not isinstance(model, nn.Module):
        if isinstance(optimized, api.Optimized):
            return api.verify(optimized, original=original, inputs=inputs)
        raise UsageError(f"optimized is a {type(model).__name__}; give what moeopt returned, a bundle, or an nn.Module")
    names = differing_blocks(original, model) if blocks is None else list(blocks)
    experts = {b.name: b.experts or 1 for b in optimized.report.blocks} if isinstance(optimized, api.Optimized) else {}
    checks = check_blocks(original, model, call, names, experts, verify, seed)
    if isinstance(optimized, api.Optimized):
        end = api.verify(optimized, original=original, inputs=inputs).end_to_end
        assert end is not None
    else:
        weighted = [n for n, m in original.named_modules() if next(m.parameters(recurse=False), None) is not None]
        end = end_to_end(original, model, *call, noise_blocks=weighted, seed=seed)
    notes = []
    if end.passed is False and all(check.passed for check in checks):
        found = first_difference(original, model, *call)
        if found is not None:
            notes.append(f"the first submodule that gets the same and gives another result: {found[0] or 'the model'}"
                         f" ({found[1]:.3g} apart at its worst token)")  # fmt: skip
    first = next(original.parameters(), torch.empty(0))
    dtype = str(first.dtype).removeprefix("torch.")
    return Certificate(checks, end, level=verify, device=str(first.device), dtype=dtype, notes=notes)


@dataclass(frozen=True)
class BundleCheck:
    """What checking a bundle gave; ``regressions`` is empty without a stored certificate, or where none is."""

    certificate: Certificate
    regressions: list[Regression] = field(default_factory=list)

    def failure(self) -> str:
        """Why it is not good, in lines; "" when it is."""
        lines = [] if self.certificate.passed is True else [failure_text(self.certificate)]
        if self.regressions:
            lines.append("worse than the stored certificate:")
            lines += [f"  {regression}" for regression in self.regressions]
        return "\n".join(lines)


def check_bundle(
    directory: str | os.PathLike[str],
    provider: str | None = None,
    against: str | os.PathLike[str] | None = None,
    limits: LoadLimits | None = None,
) -> BundleCheck:
    """Run a bundle's golden check, and compare it with a stored certificate.

    Args:
        directory: what ``Optimized.save`` wrote.
        provider: as in :func:`moeopt.verify`.
        against: a certificate file; the bundle's blocks, as they were verified, and this check must not be worse.
        limits: the time and memory that the bundle may take, as in :func:`moeopt.load`.
    """
    stored = None if against is None else read_certificate(against)
    checked = api.verify(directory, provider=provider, limits=limits)
    if stored is None:
        return BundleCheck(checked)
    saved = Certificate.from_json(read_manifest(directory).read_text("certificate.json"))
    return BundleCheck(checked, regressions(stored, current(saved, checked, stored)))


def facts(certificate: Certificate) -> dict[str, str]:
    """A certificate's figures as text, for a test report: what was required, what was allowed, where, with what."""
    end = certificate.end_to_end
    found = {"passed": str(certificate.passed), "executed": str(certificate.executed), "device": certificate.device}
    if end is not None:
        found |= {"tolerance_required": f"{end.distance:.3e}", "tolerance_allowed": f"{end.budget:.3e}"}
    if certificate.blocks:
        worst = max(certificate.blocks, key=lambda block: block.required)
        found |= {"factor_required": f"{worst.required:.3g}", "factor_allowed": f"{FACTOR:g}"}
        found["worst_block"] = worst.name
    # plain text: torch.__version__ is of a class that pytest-xdist cannot send from its workers
    return found | {f"version.{name}": str(version) for name, version in certificate.versions.items()}


def failure_text(certificate: Certificate) -> str:
    """Why a certificate is not good: the blocks, the end, the tolerance that would be required, then all of it."""
    lines = ["not verified" if certificate.passed is None else "not equivalent"]
    lines += [f"  block {block.name}: {block.reason}" for block in certificate.blocks if block.passed is False]
    end = certificate.end_to_end
    if end is not None and end.passed is False:
        lines.append(f"  end to end: {end.reason}")
    lines += [f"  {note}" for note in certificate.notes]
    if end is not None and end.budget:
        lines.append(
            f"  tolerance required: {end.distance:.3g} relative L2 per token end to end ({end.budget:.3g} is allowed)"
        )
    for block in certificate.blocks:
        if block.passed is False and block.required:
            lines.append(
                f"  tolerance required: {block.required:.3g} times the original's own rounding in {block.name} "
                f"({FACTOR:g} is allowed)"
            )
    return "\n".join([*lines, "", str(certificate)])


def provider_names(bundle: str | os.PathLike[str]) -> tuple[str, ...]:
    """The providers that a bundle may be verified on, here or elsewhere; ``BundleError`` where there is no bundle."""
    return registry.of_bundle(bundle).provider_names()


def providers(bundle: str | os.PathLike[str]) -> dict[str, str]:
    """Each provider that could run a bundle, and why it is not on this machine ("" where it is).

    Raises:
        BundleError: the directory is no bundle, or damaged.
        UsageError: nothing here can run it, since its runtime is not installed.
    """
    return registry.of_bundle(bundle).providers(bundle)


__all__ = [
    "BundleCheck",
    "assert_equivalent",
    "check_bundle",
    "compare",
    "facts",
    "failure_text",
    "provider_names",
    "providers",
]
