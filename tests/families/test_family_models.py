"""Every family builds, runs, generates, and is the same model under each experts implementation."""

import pytest
import torch

from tests.families import FAMILIES

pytest.importorskip("transformers")


@pytest.mark.sample(4)  # test_families.py builds and calls each of them
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family_builds_and_generates(name):
    family = FAMILIES[name]
    if not family.available:
        pytest.skip(f"{name} needs transformers {'.'.join(map(str, family.min_version))}")
    logits = []
    for implementation in family.implementation_names:
        model, inputs = family.build(implementation), family.inputs()
        with torch.no_grad():
            logits.append(model(**inputs).logits)
            again = model(**inputs).logits
        assert torch.equal(logits[-1], again)
        assert logits[-1].isfinite().all() and logits[-1].std() > 0.1
    for other in logits[1:]:
        # three GEMMs of at most 48 terms in another order, in two layers
        torch.testing.assert_close(other, logits[0], rtol=0, atol=256 * torch.finfo(torch.float32).eps)
    tokens = family.generate(model, new_tokens=5)
    assert tokens.shape[0] == 2 and len(set(tokens[0].tolist())) > 2
