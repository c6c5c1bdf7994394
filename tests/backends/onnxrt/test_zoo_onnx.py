"""The zoo as ONNX Runtime engines: right at sizes that were not seen at export, or refused with a reason.

The default run takes the models of ``SAMPLE``; ``MOEOPT_NIGHTLY=1`` takes all of them.
"""

import copy
import inspect
import os

import pytest
import torch

import moeopt
from moeopt.backends.onnxrt.providers import runtime
from moeopt.errors import NotEquivalentError, NotSaveableError, UsageError
from tests.helpers import assert_same, run
from tests.zoo import CASES

try:
    runtime()
except UsageError as err:
    pytest.skip(str(err), allow_module_level=True)

SAMPLE = """
    act_clamped_gpt_oss act_relu_squared_by_mul around_counters capacity_nano_moe_drops declined_python_counter
    declined_gumbel declined_meta_parameters dtype_bfloat16_float32_accumulator hit_sentinel_ids branch_writes_its_input
    mixture_language_mask mixture_cond_conv router_outside branch_sequence_first branch_example_of_one_token
    layout_hidden_is_twice_inter_in_out branch_top_k_argument all_labml_switch row_norm_inside
    row_dense_mixture_of_three_layers ids_in_float_columns_routed unequal_packed_experts levels_group_then_expert
    distances_to_centers flags_of_groups pixels_with_channels_last
""".split()
NIGHTLY = os.environ.get("MOEOPT_NIGHTLY") == "1"
ON_A_LESSER_CPU = set(SAMPLE[::4])
"""Of the engines, whose kernels ask the CPU by themselves, these are compared with another order of PyTorch's sums."""

REFUSED = {
    "all_labml_switch": "data-dependent",
    "around_dataclass_output": "register_dataclass",
    "branch_accumulates_into_its_input": "writes to its argument 'x'",
    "branch_writes_its_input": "writes to its argument 'x'",
    "declined_gumbel": "draws random numbers",
    "declined_python_counter": "self.calls of CallCounter changes at each call",
    "mixture_cond_conv": "no ONNX form",
}
"""Models that cannot be an engine, and what the refusal says."""


FLOAT32_INSIDE = {"dtype_float64", "bfloat16_experts_in_float32"}
"""A float64 model whose router casts to float32, and a float32 model with bfloat16 experts: their own rounding is that
of the narrower dtype, and the wider one's bound is unfair. ``test_narrow_experts`` has a fair one."""


def example(case, model):
    args, kwargs = case.inputs()
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments) if kwargs else args


def wider(case):
    """Batch 7 with one token, and one sequence of 513, where the model takes one float tensor."""
    args, kwargs = case.fresh(1)
    if kwargs or len(args) != 1 or not args[0].is_floating_point() or args[0].dim() not in (2, 3):
        return
    g = torch.Generator().manual_seed(5)
    for batch, length in ((7, 1), (1, 513)):
        shape = (batch, length) if args[0].dim() == 3 else (batch * length,)
        yield (torch.randn(*shape, args[0].shape[-1], generator=g).to(args[0].dtype),), {}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ON_A_LESSER_CPU else pytest.mark.one_isa)
        for name in (sorted(set(CASES) - FLOAT32_INSIDE) if NIGHTLY else SAMPLE)
    ],
)
def test_zoo_engine(name):
    case = CASES[name]
    original, given = case.build(), case.build()
    try:
        opt = moeopt.optimize(given, example(case, given), backend="onnxruntime", verify="fast")
    except (NotSaveableError, NotEquivalentError) as err:
        if name in REFUSED:
            assert REFUSED[name] in str(err), str(err)
        else:
            assert case.expect != "rewritten", str(err)
        return
    assert name not in REFUSED, "this one should be refused"
    assert opt.certificate.passed is True, str(opt.certificate)
    compared = 0
    for call in [*(case.fresh(i) for i in range(4)), *wider(case)]:
        try:
            want = run(original, copy.deepcopy(call))
        except (RuntimeError, IndexError, ValueError):
            continue  # the model itself does not take this size
        try:
            got = run(opt, copy.deepcopy(call))
        except UsageError as err:  # an engine says which calls it holds for
            assert case.expect != "rewritten" or "has size 0" in str(err), str(err)
            continue
        compared += 1
        leaves = [t for t in torch.utils._pytree.tree_leaves(want) if isinstance(t, torch.Tensor)]
        if any(t.dtype in (torch.float16, torch.bfloat16) for t in leaves):
            close_but_for_ties(got, want)
        else:
            assert_same(got, want)
    assert compared


def close_but_for_ties(got, want):
    """A 16-bit router ties about once in a hundred tokens, and each runtime breaks ties its own way."""
    far = (got.float() - want.float()).flatten(0, -2).norm(dim=-1) / want.float().flatten(0, -2).norm(dim=-1)
    assert (far > 0.03).float().mean() <= 0.02 and got.dtype == want.dtype
