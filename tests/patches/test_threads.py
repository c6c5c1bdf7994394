"""Nothing stays patched, whoever comes and goes in which order, and other threads see the libraries as they are."""

import gc
import logging
import os
import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.sym_node import SymNode

import moeopt
from moeopt import patches
from moeopt.options import variable_set
from moeopt.patches import output


def state():
    """What moeopt changes in the process, as it stands."""
    found = {
        "gc": (gc.get_threshold(), gc.isenabled()),
        "environment": dict(os.environ),
        "call": vars(nn.Module)["__call__"],
        "to": vars(nn.Module)["to"],
        "bool_": vars(SymNode)["bool_"],
        "guard_int": vars(SymNode)["guard_int"],
        "fake": vars(FakeTensorMode)["__init__"],
        "stdout": sys.stdout,
        "filters": list(warnings.filters),
        "levels": [logging.getLogger(name).level for name in (*output._LOUD, "torch._subclasses.fake_tensor")],
    }
    if "transformers.utils.loading_report" in sys.modules:
        report = getattr(sys.modules["transformers.utils.loading_report"], "LoadStateDictInfo", None)
        found["report"] = getattr(report, "create_loading_report", None)
    if "onnxscript.rewriter._matcher" in sys.modules:
        found["match"] = vars(sys.modules["onnxscript.rewriter._matcher"].SimplePatternMatcher)["match"]
    if "torch.onnx._internal.exporter._registration" in sys.modules:
        registry = sys.modules["torch.onnx._internal.exporter._registration"].ONNXRegistry
        found["registry"] = vars(registry)["from_torchlib"]
    if "torch.onnx._internal.exporter._fx_passes" in sys.modules:
        found["passes"] = vars(sys.modules["torch.onnx._internal.exporter._fx_passes"])["decompose_with_registry"]
    return found


def attend(theirs, *args, **options):
    return theirs(*args, **options)


EVERY = {
    "fewer_collections": patches.fewer_collections,
    "no_collections": patches.no_collections,
    "no_warnings": patches.no_warnings,
    "variable_set": lambda: variable_set("MOEOPT_OF_NOBODY", "1"),
    "module_calls": lambda: patches.module_calls(lambda run, module, args, kwargs: run(module, *args, **kwargs)),
    "size_questions": lambda: patches.size_questions(lambda node, answer, frame: None),
    "size_answers": lambda: patches.size_answers(lambda node: None),
    "idle_moves": patches.idle_moves,
    "no_results_kept": patches.no_results_kept,
    "no_export_dump": patches.no_export_dump,
    "rules_by_their_last_op": patches.rules_by_their_last_op,
    "one_registry": patches.one_registry,
    "no_idle_decomposition": patches.no_idle_decomposition,
    "sdpa_of": lambda: patches.sdpa_of(attend),
    "kept_load_report": patches.kept_load_report,
    "no_fake_tensor_errors": patches.no_fake_tensor_errors,
    "quiet": patches.quiet,
}


@pytest.mark.parametrize("name", EVERY)
def test_the_first_to_come_may_be_the_first_to_leave(name):
    if name in ("rules_by_their_last_op", "one_registry", "no_idle_decomposition"):
        pytest.importorskip("onnxscript")
    if name in ("sdpa_of", "kept_load_report"):
        pytest.importorskip("transformers")
    with EVERY[name]():  # imports what the patch imports
        pass
    before = state()
    first, second = EVERY[name](), EVERY[name]()
    first.__enter__()
    inside = state()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state() == inside  # the second caller still has it
    second.__exit__(None, None, None)
    assert state() == before


_OF_THE_PROCESS = (
    r"catch_warnings|filterwarnings|simplefilter|gc\.(?:disable|set_threshold)|sys\.std\w+ = |os\.environ\[.*\] = "
)


def test_the_process_is_changed_in_patches_alone():
    """``warnings.catch_warnings`` and the like restore what they found, so two threads leave a change behind."""
    home = Path(moeopt.__file__).parent
    changed = {
        str(path.relative_to(home))
        for path in home.rglob("*.py")
        if re.search(_OF_THE_PROCESS, path.read_text()) and "patches" not in path.parts
    }
    assert changed == {"options/environment.py"}  # counted as well: variable_set, above


def test_what_the_user_sets_meanwhile_stays():
    kept = gc.get_threshold()
    try:
        with patches.fewer_collections():
            gc.set_threshold(5_000, 3, 3)
        assert gc.get_threshold() == (5_000, 3, 3)
    finally:
        gc.set_threshold(*kept)


def test_only_the_callers_thread_is_hushed(capsys):
    heard = []

    def other():
        print("served")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            warnings.warn("stale", stacklevel=1)
        heard.extend(str(w.message) for w in told)

    with patches.quiet():
        print("progress")
        warnings.warn("of the exporter", stacklevel=1)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert capsys.readouterr().out == "served\n"
    assert heard == ["stale"]


def test_another_threads_filter_of_warnings_stays(monkeypatch):
    theirs, add = ("ignore", None, UserWarning, None, 7), warnings.filterwarnings

    def meanwhile(*args, **kwargs):
        add(*args, **kwargs)
        warnings.filters.insert(0, theirs)

    with warnings.catch_warnings():
        before = list(warnings.filters)
        monkeypatch.setattr(warnings, "filterwarnings", meanwhile)
        output._filters_changed()
        assert warnings.filters == [theirs, *before]


@pytest.mark.parametrize("patch", [patches.quiet, patches.no_warnings])
def test_a_warning_inside_is_no_error_where_warnings_are_errors(patch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patch():
            warnings.warn("of the exporter", stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("of the user", stacklevel=1)


class Loop(nn.Module):
    """A naive mixture of experts with the given function."""

    def __init__(self, width=16, count=4, act=None, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), act or nn.GELU(), nn.Linear(24, width)) for _ in range(count)
        )

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            if token.numel():
                y.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return y.view_as(x)


def told(opt):
    return [(b.status, b.reason, b.spec) for b in opt.report.blocks]


def test_two_threads_optimise_while_a_third_serves():
    """The same reports and numbers as alone, and nothing left patched."""
    pytest.importorskip("onnxruntime")
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    gelu, relu = Loop().eval(), Loop(act=nn.ReLU(), seed=1).eval()
    served = moeopt.optimize(Loop(seed=2).eval(), x, backend="onnxruntime", verify="fast")
    want = served(x)
    alone = [told(moeopt.optimize(m, x, backend=b, verify="fast")) for m, b in ((gelu, "onnxruntime"), (relu, "torch"))]
    before = state()
    results, errors, done = {}, [], threading.Event()

    def work(key, model, backend, **options):
        try:
            results[key] = moeopt.optimize(model, x, backend=backend, verify="fast", **options)
        except Exception as err:  # shown by the assertion below
            errors.append(err)

    def serve():
        while not done.is_set():
            if not torch.equal(served(x), want):
                errors.append("the served engine gave other numbers")

    hint = moeopt.ExpertsSpec(rows="plain", activation="relu")
    threads = [
        threading.Thread(target=work, args=("gelu", gelu, "onnxruntime")),
        threading.Thread(target=work, args=("relu", relu, "torch"), kwargs={"hints": {"*": hint}}),
    ]
    server = threading.Thread(target=serve)
    for thread in [server, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    server.join()
    assert not errors
    assert [told(results[key]) for key in ("gelu", "relu")] == alone
    with torch.no_grad():
        for key, model in (("gelu", gelu), ("relu", relu)):
            torch.testing.assert_close(results[key](x), model(x), rtol=1e-5, atol=1e-6)
    assert state() == before
