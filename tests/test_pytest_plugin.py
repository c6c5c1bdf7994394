"""The pytest plugin, as its user sees it: which tests there are, how they end, and what the JUnit report says."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from moeopt.testing import check_bundle

pytest_plugins = ["pytester"]
PLUGIN = ("-p", "moeopt.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest")
NO_CUDA = "*SKIPPED*cuda: PyTorch sees no CUDA GPU on this machine*"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the tests that are skipped without a GPU")


@pytest.fixture(scope="module")
def bundle(toy_bundle):
    check_bundle(toy_bundle)  # imports what it needs: pytester drops what is imported inside it
    return toy_bundle


@pytest.fixture
def run(pytester):
    def run(*args):
        return pytester.runpytest_inprocess(*PLUGIN, "-ra", *map(str, args))

    return run


def properties(path):
    """{test name: {property: value}} of a JUnit report."""
    return {
        case.get("name"): {p.get("name"): p.get("value") for p in case.iter("property")}
        for case in ElementTree.parse(path).iter("testcase")
    }


def test_a_marked_test_runs_once_for_each_provider(pytester, run, bundle):
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.moeopt_bundle({str(bundle)!r})
        def test_engine():
            print("the body ran")

        @pytest.mark.moeopt_bundle({str(bundle)!r}, certificate={str(bundle / "certificate.json")!r})
        def test_body(moeopt_provider):
            assert moeopt_provider == "cpu"
            raise ValueError("the body failed")
        """
    )
    result = run("-s", "--strict-markers", "--junitxml=report.xml")
    result.assert_outcomes(passed=1, failed=1, skipped=2)
    result.stdout.fnmatch_lines([NO_CUDA])
    assert result.stdout.str().count("the body ran") == 1 and "ValueError: the body failed" in result.stdout.str()
    found = properties("report.xml")
    assert set(found) == {f"test_{name}[{p}]" for name in ("engine", "body") for p in ("cpu", "cuda")}
    figures = found["test_engine[cpu]"]
    assert figures["moeopt.tolerance_required"] == "0.000e+00" and float(figures["moeopt.tolerance_allowed"]) > 0
    assert figures["moeopt.provider"] == "cpu" and figures["moeopt.version.torch"]
    assert figures["moeopt.factor_allowed"] == "4" and figures["moeopt.worst_block"] == "Block"
    assert found["test_engine[cuda]"] == {"moeopt.provider": "cuda"}


def test_bundles_are_checked_without_a_test_file(run, bundle):
    result = run("--moeopt-bundle", bundle, "--moeopt-bundle", "missing", "-v")
    result.assert_outcomes(passed=1, skipped=1, failed=1)
    result.stdout.fnmatch_lines(["*bundle::golden?cpu? PASSED*", "moeopt: *missing is no directory: it is not a*"])
    run("--moeopt-bundle", bundle, "-k", "cpu").assert_outcomes(passed=1, deselected=1)


def test_a_damaged_bundle_fails(run, bundle, tmp_path):
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "damaged")
    (copy / "graph.json").write_text("{}")
    result = run("--moeopt-bundle", copy, "-k", "cpu")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["*graph.json: it has 2 bytes, and the manifest says *"])
    assert "Traceback" not in result.stdout.str()


def test_a_regression_is_shown_as_a_difference(run, bundle, tmp_path):
    """The stored block was 1e-12 away; what is there now is rounding of float32 and more than 8 eps of float64."""
    stored = tmp_path / "stored.json"
    text = (bundle / "certificate.json").read_text()
    stored.write_text(text.replace('"dtype": "float32"', '"dtype": "float64"').replace("e-07", "e-12"))
    result = run("--moeopt-bundle", bundle, "--moeopt-certificate", stored, "-k", "cpu", "--junitxml=report.xml")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(
        ["worse than the stored certificate:", "  Block: from the float64 oracle: * times as far; rounding explains *"]
    )
    assert int(properties("report.xml")["golden[cpu]"]["moeopt.regressions"]) >= 1
    run("--moeopt-bundle", bundle, "--moeopt-certificate", bundle / "certificate.json").assert_outcomes(
        passed=1, skipped=1
    )


def test_the_fixture_records_what_a_failure_required(pytester, run, bundle):
    pytester.makepyfile(
        """
        import torch, moeopt
        from tests.toy_moe import X, build

        def test_same(assert_equivalent):
            assert assert_equivalent(build(), build(), X).passed

        def test_other(assert_equivalent):
            other = build()
            with torch.no_grad():
                other.experts[1].w1.weight.mul_(1.01)
            assert_equivalent(build(), other, X)
        """
    )
    result = run("--junitxml=report.xml")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["not equivalent", "  block experts.1.w1: *", "  tolerance required: 0.0114 *"])
    found = properties("report.xml")
    assert 0.01 < float(found["test_other"]["moeopt.tolerance_required"]) < 0.02
    assert float(found["test_same"]["moeopt.tolerance_required"]) == 0.0


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--moeopt-certificate", "c.json"], "--moeopt-certificate compares one bundle: give one --moeopt-bundle"),
        (["wrong_mark.py"], "write @pytest.mark.moeopt_bundle(directory, certificate=None)"),
    ],
)
def test_wrong_use(pytester, run, args, text):
    pytester.makepyfile(wrong_mark="import pytest\n@pytest.mark.moeopt_bundle\ndef test_engine(): pass")
    result = run(*args)
    assert result.ret != 0 and text in result.stdout.str() + result.stderr.str()


def test_a_run_that_does_not_use_it_does_not_wait_for_torch(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import sys\ndef test_mine():\n    assert 'moeopt.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'numpy', 'moeopt.api'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", *PLUGIN, "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
