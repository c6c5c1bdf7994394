"""Four published models on 8, 16 and 64 H100: figures worked out apart from this package, from the models' shapes.

Memory is in GB a device: experts / devices + rest / 8 (split in a node). Rows are copies of a token that leave its
device, kB those of 8-bit rows out and 16-bit rows back. Milliseconds are (tensor parallel: experts + sent, expert
parallel: experts + sent) of a decoding step in fp8.
"""

import pytest

import moeopt
from tests.inspection.published import SHAPES

pytest.importorskip("transformers")

FITS = {
    ("DeepSeek-V3", 8): {"bfloat16": (167.8, None), "fp8": (83.9, None), "int4": (47.7, 346)},
    ("DeepSeek-V3", 16): {"bfloat16": (86.0, None), "fp8": (43.0, 412), "int4": (26.0, 655)},
    ("DeepSeek-V3", 64): {"bfloat16": (24.7, 673), "fp8": (12.4, 849), "int4": (9.7, 886)},
    ("Kimi K2", 8): {"bfloat16": (256.6, None), "fp8": (128.3, None), "int4": (70.3, 24)},
    ("Kimi K2", 16): {"bfloat16": (129.8, None), "fp8": (64.9, 101), "int4": (36.6, 503)},
    ("Kimi K2", 64): {"bfloat16": (34.6, 532), "fp8": (17.3, 778), "int4": (11.4, 863)},
    ("Qwen3-235B-A22B", 8): {"bfloat16": (58.8, 69), "fp8": (29.4, 221), "int4": (17.1, 285)},
    ("Qwen3-235B-A22B", 16): {"bfloat16": (30.4, 216), "fp8": (15.2, 295), "int4": (9.5, 324)},
    ("Qwen3-235B-A22B", 64): {"bfloat16": (9.1, 327), "fp8": (4.5, 350), "int4": (3.9, 354)},
    ("gpt-oss-120b", 8): {"bfloat16": (29.2, 581), "fp8": (14.6, 779), "int4": (8.1, 866)},
    ("gpt-oss-120b", 16): {"bfloat16": (14.9, 775), "fp8": (7.4, 876), "int4": (4.3, 918)},
    ("gpt-oss-120b", 64): {"bfloat16": (4.1, 921), "fp8": (2.1, 949), "int4": (1.5, 956)},
}
"""(GB together, thousands of tokens of cache that fit beside; None where the weights do not fit)."""

SENT = {
    ("DeepSeek-V3", 8): (151, 4.63, 100, 0, 25), ("DeepSeek-V3", 16): (161, 6.12, 132, 21, 27),
    ("DeepSeek-V3", 64): (169, 7.56, 162, 100, 28),
    ("Kimi K2", 8): (151, 4.62, 99, 0, 25), ("Kimi K2", 16): (161, 6.09, 131, 21, 27),
    ("Kimi K2", 64): (169, 7.52, 162, 99, 28),
    ("Qwen3-235B-A22B", 8): (86, 4.67, 57, 0, 14), ("Qwen3-235B-A22B", 16): (92, 6.18, 76, 12, 15),
    ("Qwen3-235B-A22B", 64): (97, 7.66, 94, 57, 16),
    ("gpt-oss-120b", 8): (30, 2.92, 25, 0, 10), ("gpt-oss-120b", 16): (32, 3.45, 30, 8, 11),
    ("gpt-oss-120b", 64): (34, 3.89, 34, 25, 11),
}  # fmt: skip
"""(kB of a row an expert, copies with a row a device, their kB, kB with a row a node, kB of tensor parallelism)."""

STEPS = {
    ("DeepSeek-V3", 8): [(5.47, 0.61, 9.97, 1.17), (21.21, 0.79, 24.41, 1.26), (24.41, 2.24, 24.41, 1.98),
                         (24.41, 13.82, 24.41, 7.73), (84.59, 106.54, 85.76, 53.75)],
    ("DeepSeek-V3", 64): [(0.68, 1.79, 2.27, 1.18), (2.65, 2.18, 3.05, 1.30), (3.05, 5.26, 3.05, 2.25),
                          (3.05, 29.88, 3.05, 9.90), (10.57, 226.90, 10.99, 71.05)],
    ("Kimi K2", 8): [(5.87, 0.63, 10.82, 1.21), (28.03, 0.81, 34.02, 1.31), (37.87, 2.31, 37.87, 2.05),
                     (37.87, 14.30, 37.87, 7.98), (87.51, 110.21, 88.71, 55.46)],
    ("Kimi K2", 64): [(0.73, 1.86, 2.48, 1.22), (3.50, 2.25, 4.73, 1.34), (4.73, 5.44, 4.73, 2.33),
                      (4.73, 30.92, 4.73, 10.21), (10.94, 234.72, 11.37, 73.28)],
    ("Qwen3-235B-A22B", 8): [(3.42, 0.96, 6.02, 1.89), (8.34, 1.13, 8.48, 1.98), (8.48, 2.47, 8.48, 2.65),
                             (8.48, 13.21, 8.48, 8.02), (58.75, 99.07, 59.57, 51.00)],
    ("Qwen3-235B-A22B", 64): [(0.43, 2.87, 1.06, 1.90), (1.04, 3.23, 1.06, 2.01), (1.06, 6.08, 1.06, 2.90),
                              (1.06, 28.89, 1.06, 10.05), (7.34, 211.34, 7.63, 67.20)],
    ("gpt-oss-120b", 8): [(0.96, 0.37, 2.08, 0.72), (3.72, 0.41, 4.28, 0.74), (4.28, 0.77, 4.28, 0.85),
                          (4.28, 3.66, 4.28, 1.76), (14.83, 26.78, 15.12, 9.00)],
    ("gpt-oss-120b", 64): [(0.12, 1.09, 0.51, 0.72), (0.46, 1.19, 0.53, 0.74), (0.53, 1.96, 0.53, 0.89),
                           (0.53, 8.10, 0.53, 2.06), (1.85, 57.23, 1.96, 11.41)],
}  # fmt: skip


@pytest.mark.sample(3)
@pytest.mark.parametrize(("name", "devices"), FITS)
def test_what_fits_and_what_is_sent(name, devices):
    for dtype, (together, thousands) in FITS[name, devices].items():
        plan = moeopt.plan(SHAPES[name].fields, devices=devices, device="h100", dtype=dtype)
        memory = plan.memory
        assert (memory.experts + memory.rest_split) / 1e9 == pytest.approx(together, abs=0.06)
        assert memory.fits_split == (thousands is not None)
        assert thousands is None or memory.cache_tokens == pytest.approx(1000 * thousands, abs=800)
        if dtype == "fp8":
            t = plan.traffic
            rows, copies, ranks, nodes, reduced = SENT[name, devices]
            assert t.copies_ranks == pytest.approx(copies, abs=0.006)
            for bytes_, kilo in ((t.rows, rows), (t.ranks, ranks), (t.nodes, nodes), (t.all_reduce, reduced)):
                assert bytes_ / 1e3 == pytest.approx(kilo, abs=0.6)


@pytest.mark.parametrize(("name", "devices"), STEPS)
def test_where_expert_parallelism_beats_tensor_parallelism(name, devices):
    plan = moeopt.plan(SHAPES[name].fields, devices=devices, device="h100", dtype="fp8")
    for step, want in zip(plan.decode, STEPS[name, devices], strict=True):
        got = (step.tensor_experts, step.tensor_sent, step.expert_experts, step.expert_sent)
        assert [1e3 * seconds for seconds in got] == pytest.approx(want, abs=0.011)
