"""The figures of quantised kernels in the documentation are those that were measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_says_what_the_benchmark_wrote():
    measured = json.loads((ROOT / "benchmarks/results/quantised-1t.json").read_text())["milliseconds"]
    page = " ".join((ROOT / "docs/quantised.md").read_text().split())
    figures = re.search(
        r"one token (\S+) and (\S+) ms beside (\S+) of float32, 64 tokens (\S+) and (\S+) ms beside (\S+):", page
    )
    assert figures is not None
    one, many = measured["1"], measured["64"]
    assert list(figures.groups()) == [
        *(f"{one[name]:.1f}" for name in ("int8", "int4", "float32")),
        *(f"{many[name]:.0f}" for name in ("int8", "int4", "float32")),
    ]


def test_the_table_of_methods_is_what_the_benchmark_wrote():
    losses = json.loads((ROOT / "benchmarks/results/quantise-methods.json").read_text())["losses"]
    rows = []
    for kind, words in (("moe", "MoE"), ("dense", "dense, 4 groups")):
        for format, by in losses[kind].items():
            plain = " | ".join(f"{by[method]['kl_mean']:.2e}" for method in ("nearest", "search", "gptq"))
            rows.append(f"| {words} | {format} | {plain} ({by['gptq']['least']:.2e} to {by['gptq']['most']:.2e}) |")
    assert "\n".join(rows) in (ROOT / "docs/quantised.md").read_text()
    for kind in losses:  # what the page says of them in words
        for format in ("int4", "int4-block128", "mxfp4"):
            by = losses[kind][format]
            assert by["gptq"]["most"] < 0.65 * by["nearest"]["kl_mean"]
            assert by["search"]["kl_mean"] < by["nearest"]["kl_mean"]


def test_what_a_cache_of_codes_is_worth_is_what_the_benchmark_wrote():
    steps = json.loads((ROOT / "benchmarks/results/cache-codes-1t.json").read_text())["steps"]
    plain = {step["past"]: step["ms"] for step in steps if step["cache"] == "float32"}
    told = []
    for bits in ("8", "4"):
        mine = [step for step in steps if step["cache"].startswith(bits)]
        times, moved = [step["ms"] / plain[step["past"]] for step in mine], [step["of_floats"] for step in mine]
        told.append((f"{min(times):.2f} to {max(times):.2f}", f"{min(moved):.1e} to {max(moved):.1e}"))
        assert max(step["of_codes"] for step in mine) < 2e-6
    (eight, far), (four, farther) = told
    page = (ROOT / "docs/quantised.md").read_text()
    assert f"8 bits take {eight} of the float cache's time, 4 bits {four}; on random numbers" in page
    assert f"8 bits move the result by {far}, 4 bits by {farther} (" in page


def test_a_quantised_decode_is_what_the_benchmark_wrote():
    forms = json.loads((ROOT / "benchmarks/results/quantised-model-1t.json").read_text())["forms"]
    rows = [
        f"| {name} | {f['ms']:.1f} ms | {f['times_as_fast']:.2f} | {f['python_ms']:.1f} | {f['nodes']:.0f} "
        f"| {f['products_ms']:.1f} | {f['idle_ms']:.1f} | {f['others_ms']:.1f} | {f['file_bytes'] / 1e6:.0f} MB |"
        for name, f in forms.items()
    ]
    assert "\n".join(rows) in (ROOT / "docs/performance.md").read_text()
    gain = {name: f"{f['times_as_fast']:.2f}" for name, f in forms.items()}
    page = " ".join((ROOT / "docs/quantised.md").read_text().split())
    for said in (
        f"all in int4 with float activations {gain['int4 all']} times as fast as float32's engine",
        f"with int8 activations {gain['int4 all, int8 activations']} times",
        f"all in int8 with int8 activations {gain['int8 all, int8 activations']} times",
        f"experts alone in int8 {gain['int8 experts']} (",
        f"in int4 {gain['int4 experts']} (",
    ):
        assert said in page


def test_what_products_lose_by_each_method_is_what_the_benchmark_wrote():
    measured = json.loads((ROOT / "benchmarks/results/quantise-products.json").read_text())["kl_mean"]

    def told(by):
        mean = sum(by["gptq"]) / len(by["gptq"])
        assert mean < 0.6 * by["search"][0] < by["nearest"][0]
        return (
            f"{by['nearest'][0]:.2e} to nearest, {by['search'][0]:.2e} searched and {mean:.2e} by GPTQ "
            f"({min(by['gptq']):.2e} to {max(by['gptq']):.2e})"
        )

    page = (ROOT / "docs/quantised.md").read_text()
    assert f"with experts in floats {told(measured['experts float'])}, with experts in 4 bits too" in page
    assert f"in 4 bits too {told(measured['experts int4'])} (" in page


def test_ktransformers_beside_the_kernel_is_what_the_benchmark_wrote():
    rows = []
    for dtype in ("int8", "int4"):
        name = f"native-mixtral-small-{dtype}-ktransformers-avx512-1t.json"
        tokens = json.loads((ROOT / "benchmarks/results" / name).read_text())["tokens"]
        for words, peer in (
            ('moeopt, `activations="int8"`', "moeopt, rows of 8 bits"),
            ("`MatMulNBits` at level 4", "ORT MatMulNBits level 4"),
            ("KTransformers", "KTransformers"),
        ):
            figures = " | ".join(f"{row['ms'][peer]:.1f}" for row in tokens.values())
            rows.append(f"| {dtype}: {words} | {figures} |")
    assert "\n".join(rows) in (ROOT / "docs/performance.md").read_text()
