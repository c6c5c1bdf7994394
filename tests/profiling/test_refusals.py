"""What cannot be profiled: each refusal says what, where, and the way out."""

import pytest
from torch import nn

import moeopt
from moeopt.errors import CaptureError, UsageError
from tests.backends.torch.toys import save
from tests.profiling.test_profile import BATCHES
from tests.toy_moe import Block, Expert, H, seeded


@pytest.mark.parametrize(
    ("model", "data", "error", "text"),
    [
        (nn.Linear(H, H), BATCHES[0], UsageError, "Linear has no mixture-of-experts block (nothing was found)"),
        (Expert(), BATCHES[0], UsageError, "(1 dense feed-forward block was found), so there is no expert load"),
        (Block(), [], UsageError, "data yields no batch: there is nothing to profile"),
        (Block(), 7, UsageError, "data is a int; give one call's inputs (a tensor, a tuple of positional"),
        (Block(), "text", UsageError, "data is a str; give one call's inputs"),
        (Block(), [BATCHES[0], 3], UsageError, "batch 1 of the data: example_inputs is a int; give a tensor"),
        (Block(), seeded(2, 3), CaptureError, "Block raised RuntimeError"),
        (Block(), [BATCHES[0], seeded(2, 3)], CaptureError, "Block raised RuntimeError on batch 1 of the data: "),
        ("bundle", None, UsageError, "'bundle' is a path: routing happens inside an engine's graph and cannot be"),
        (3, BATCHES[0], UsageError, "model is a int; give an nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore::moeopt.errors.StaleModelWarning")  # the batch of another size runs as written
def test_what_cannot_be_profiled_says_so(model, data, error, text):
    with pytest.raises(error) as err:
        moeopt.profile(model.eval() if isinstance(model, nn.Module) else model, data)
    assert text in str(err.value)


def test_a_loaded_bundle_is_an_engine(tmp_path):
    save(tmp_path / "bundle")
    with pytest.raises(UsageError, match="this is an engine: routing happens inside .* profile the original model"):
        moeopt.profile(moeopt.load(tmp_path / "bundle"), BATCHES[0])
