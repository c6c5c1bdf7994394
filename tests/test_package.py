"""``import moeopt`` is light, and every public name is there when it is asked for."""

import subprocess
import sys

import pytest

import moeopt


def test_every_public_name_is_there():
    assert set(moeopt.__all__) <= set(dir(moeopt))
    for name in moeopt.__all__:
        assert getattr(moeopt, name) is not None
    assert set(moeopt.__all__) == {*moeopt._HOME, "__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moeopt' has no attribute 'optimise'"):
        moeopt.optimise  # noqa: B018


def test_importing_it_does_not_load_torch():
    code = "import sys, moeopt; moeopt.errors.UsageError; assert not {'torch', 'moeopt.api'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert moeopt.ops.__name__ == "moeopt.ops", "submodules are found"


def test_what_optimises_and_loads_does_not_load_torch_s_compiler():
    rooms = "moeopt.api, moeopt.ops.experts, moeopt.rewrite.install, moeopt.backends.torch.backend"
    code = f"import sys, {rooms}; assert not {{'torch._dynamo', 'triton'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
