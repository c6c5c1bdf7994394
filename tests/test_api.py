"""The public calls: their errors by text, the forms of example inputs, hints, levels of verification."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import moeopt
from moeopt import ExpertsSpec, Options, UsageError
from tests.toy_moe import IDS, Block, Expert, H, X, build, close, mixtral, optimized, seeded


class Two(Block):
    def forward(self, x, scale):
        return super().forward(x * scale)


class Closure(nn.Module):
    """Cannot be deep-copied."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.generator = (i for i in range(3))

    def forward(self, x):
        return self.block(x)


def patched():
    model = build()
    inner = model.experts[0].forward
    model.experts[0].forward = lambda x: inner(x)
    return model


def traced():
    """It has no signature, and no module at a number in a list."""
    return torch.jit.trace(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))


def without_values():
    model = build()
    with torch.device("meta"):
        moeopt.optimize(model, X, verify="off")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: moeopt.optimize(build(), X, backend="tvm"),
            "backend .tvm. is not available; use one of .torch., .on",
        ),
        (
            lambda: moeopt.optimize("model", X),
            "model is no directory: give a model, or the directory of a Hugging Face checkpoint",
        ),
        (
            lambda: moeopt.optimize(nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))), X),
            "1 is a TorchScript module, which can be neither watched nor copied with shared weights; give the Python",
        ),
        (lambda: moeopt.optimize(traced(), X, verify="off"), "model is a TorchScript module, which can be neither"),
        (lambda: moeopt.inspect(traced()), "model is a TorchScript module, which can be neither watched"),
        (without_values, "default device is 'meta', where tensors have no values, .* outside of `with torch.device"),
        (lambda: moeopt.optimize(optimized(build()), X), "optimised already; pass the original, or its .model"),
        (lambda: moeopt.optimize(build(), "x"), "example_inputs is a str; give a tensor, a tuple of positional"),
        (lambda: moeopt.optimize(build(Two)), "Two was given without example_inputs, and what it takes could not be"),
        (lambda: moeopt.optimize(build(), X, verify="maybe"), "verify='maybe': it must be one of strict, fast, off"),
        (lambda: moeopt.optimize(build(), X, verfy="off"), "there is no option 'verfy': did you mean verify"),
        (lambda: moeopt.optimize(build(), X, options=Options(seed=1), seed=2), "seed is given twice"),
        (
            lambda: moeopt.optimize(build(), X, hints={"*": 3}),
            r"hints\['\*'\] gave 3 at Block; it must be an ExpertsSpec: moeopt",
        ),
        (
            lambda: moeopt.optimize(build(Closure), X),
            "Closure cannot be copied .*take out what copy.deepcopy cannot copy",
        ),
        (
            lambda: moeopt.optimize(patched(), X),
            r"forward of experts\.0 was replaced by a function that holds on to the",
        ),
        (lambda: moeopt.verify(optimized(build())), r"verify\(optimized\) needs original=, the model to compare with"),
    ],
)
def test_usage_errors(call, text):
    with pytest.raises(UsageError, match=text):
        call()


def test_a_model_without_vocabulary_needs_inputs():
    class Odd(Block):
        main_input_name = "x"
        config = object()

    with pytest.raises(UsageError, match="Odd has no vocab_size in its config; pass example_inputs"):
        moeopt.optimize(build(Odd))


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}, ((X,), {}), ((), {"x": X})], ids=lambda i: type(i).__name__)
def test_forms_of_example_inputs(inputs):
    model = build()
    close(optimized(model, inputs)(X), model(X))


def test_two_arguments():
    model = build(Two)
    for inputs in ((X, torch.tensor(2.0)), {"x": X, "scale": torch.tensor(2.0)}, ((X,), {"scale": torch.tensor(2.0)})):
        opt = optimized(model, inputs)
        close(opt(X, torch.tensor(0.5)), model(X, torch.tensor(0.5)))


def test_inputs_are_made_up_for_a_bare_block():
    class Wide(Block):
        """Only rows of one width run."""

        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Expert(H, 24) for _ in range(4))

        def forward(self, x):
            if x.shape[-1] != H:
                raise ValueError("another width")
            return super().forward(x)

    model = build(Wide)
    close(optimized(model, None)(X), model(X))


def test_inputs_are_made_up_for_a_language_model():
    pytest.importorskip("transformers")
    model = mixtral()
    opt = optimized(model, None)
    args, kwargs = opt._call
    assert not args and kwargs["input_ids"].shape == (2, 16) and kwargs["use_cache"] is False
    assert not (kwargs["input_ids"] == 0).any(), "padding is left out"
    with torch.no_grad():
        close(opt(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_explain_leaves_the_model_untouched():
    model = build()
    keys = [(n, list(m.__dict__)) for n, m in model.named_modules()]
    report = moeopt.explain(model, X, verify="fast", inplace=True)
    assert len(report.rewritten) == 1 and keys == [(n, list(m.__dict__)) for n, m in model.named_modules()]


def test_dtype_and_device_make_a_copy():
    model = build()
    opt = optimized(model, X, dtype="bfloat16", device="cpu")
    assert next(model.parameters()).dtype is torch.float32
    assert next(opt.model.parameters()).dtype is torch.bfloat16 and opt(X.bfloat16()).dtype is torch.bfloat16
    with_inplace = optimized(model, X, dtype=torch.float64, inplace=True)
    assert with_inplace.model is model and next(model.parameters()).dtype is torch.float64


# -- hints ----------------------------------------------------------------------------------------------


class OddActivation(nn.Module):
    """silu, written as nobody would: recognition by pattern or by value may or may not know it."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(H, H, bias=False), nn.Linear(H, H, bias=False)

    def forward(self, x):
        h = self.w1(x)
        return self.w2(h - h * torch.special.expit(-h))


class OddBlock(Block):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(OddActivation() for _ in range(4))


RIGHT = ExpertsSpec(rows="plain", activation="silu", accum_dtype="float32")


def moe_block(model, **options):
    opt = moeopt.optimize(model, X, **options)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        close(opt(X), model(X))
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    return block


@pytest.mark.parametrize(
    "hint", [RIGHT, lambda expert: RIGHT if isinstance(expert, OddActivation) else None], ids=["spec", "callable"]
)
def test_a_right_hint_is_verified_and_kept(hint):
    block = moe_block(build(OddBlock), hints={"OddBlock": hint, "": hint, "*": hint})
    assert block.status == "rewritten", block.reason


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"activation": "relu"}, "from the float64 oracle"),
        pytest.param({"activation": "gelu"}, "from the float64 oracle", marks=pytest.mark.nightly),
        ({"rows": "gate|up"}, f"rows='gate|up', for which the first matrices of an expert have {2 * H} outputs, and"),
        ({"rows": "separate"}, f"have {H} and {H} outputs, and here they have {H}, before a second matrix with {H} in"),
    ],
)
def test_a_wrong_hint_is_declined(wrong, why):
    block = moe_block(build(OddBlock), hints={"*": dataclasses.replace(RIGHT, **wrong)})
    assert block.status == "declined" and why in block.reason


# -- verification, reports ------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "passed"), [("off", None), ("fast", True), ("strict", True)])
def test_levels(level, passed):
    opt = optimized(build(), X, verify=level)
    assert opt.certificate.passed is passed
    assert opt.report.blocks[0].error is None if level == "off" else opt.report.blocks[0].error < 1e-5


def test_verify_again():
    model = build()
    opt = optimized(model)
    assert moeopt.verify(opt, original=model).passed is True
    assert moeopt.verify(opt, original=model, inputs=seeded(4, 9, H)).passed is True
    other = build()
    nn.init.normal_(other.gate.weight)
    assert moeopt.verify(opt, original=other).passed is False


def test_laws_of_a_report():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe, self.ffn = Block(), Expert()

        def forward(self, x):
            return self.ffn(self.moe(x))

    report = optimized(build(Net)).report
    assert [(b.kind, b.status) for b in report.blocks] == [("moe", "rewritten"), ("dense_ffn", "declined")]
    assert all(bool(b.reason) == (b.status == "declined") for b in report.blocks)
    assert [b.name for b in report.blocks] == ["moe", "ffn"] and report.blocks[0].experts == 4
    assert moeopt.report.Report.from_json(report.to_json()) == report


def test_optimized_stands_for_its_model():
    model = build()
    opt = optimized(model)
    assert opt.top_k == 2 and opt.training is False and "1 of 1 blocks rewritten" in repr(opt)
    with pytest.raises(AttributeError):
        opt.no_such_attribute  # noqa: B018
    assert not hasattr(opt, "__len__") and [n for n, _ in opt.named_children()] == ["gate", "experts"]


def test_progress_tells_each_step():
    lines = []
    optimized(build(), X, progress=lines.append)
    assert any("looking for" in line for line in lines) and any("block 1 of 1" in line for line in lines)


def test_fuel():
    (block,) = moeopt.optimize(build(), X, fuel=0).report.blocks
    assert block.status == "declined" and "MOEOPT_FUEL=0" in block.reason
