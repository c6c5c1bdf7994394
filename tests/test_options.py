"""Options: defaults, the environment, merging, and every refusal by its text."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch

import moeopt
from moeopt.errors import UsageError
from moeopt.ops.native.compile import ISAS
from moeopt.options import Options, environment
from moeopt.options.environment import OF_USERS
from moeopt.options.instruction_sets import INSTRUCTION_SETS

SPLIT = {"dense": "split", "experts": 2}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("VERIFY", "SEED", "DISABLE_ADAPTERS", "SKIP_PASSES", "FUEL", "DUMP"):
        monkeypatch.delenv(f"MOEOPT_{name}", raising=False)


def test_defaults():
    options = Options()
    assert (options.verify, options.dense, options.seed) == ("strict", "leave", 0)
    assert options.fuel is None and options.dump is None and options.hints == {}


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().seed = 1


def test_groups_become_tuples():
    numbers = torch.tensor([[2, 0], [1, 3]])
    assert Options(groups={"mlp": numbers}, **SPLIT).groups == {"mlp": ((2, 0), (1, 3))}


def test_device_and_dtype_are_converted():
    options = Options(device="cpu", dtype="bfloat16")
    assert options.device == torch.device("cpu") and options.dtype is torch.bfloat16
    assert Options(dtype="torch.float16").dtype is torch.float16


def test_fields_go_on_top_of_options():
    merged = Options.from_fields(Options(verify="fast", seed=3), {"tune": True})
    assert (merged.verify, merged.seed, merged.tune) == ("fast", 3, True)
    assert merged.given == {"verify", "seed", "tune"}


def test_from_fields_alone():
    assert Options.from_fields(None, {"seed": 7}).seed == 7


@pytest.mark.parametrize("value", ["strict", "fast"])
def test_a_field_given_twice_is_refused_even_at_its_default(value):
    with pytest.raises(UsageError, match="verify is given twice, in options and as a keyword: give it once"):
        Options.from_fields(Options(verify=value), {"verify": "strict"})


def test_replace_does_not_count_defaults_as_given():
    options = dataclasses.replace(Options(), seed=5)
    assert options.given == {"seed"}
    assert Options.from_fields(options, {"verify": "fast"}).seed == 5


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_equal_and_remember_what_was_given(twin):
    options = Options(seed=2, dtype=torch.float16, hints={"moe": "x"})
    assert twin(options) == options and twin(options).given == options.given


def test_hash_ignores_hints():
    assert hash(Options(hints={"a": []})) == hash(Options(hints={}))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"verfy": "off"}, "there is no option 'verfy': did you mean verify"),
        ({"zzzzz": 1}, "there is no option 'zzzzz': the fields are device, dtype, verify"),
        ({"verify": "loose"}, "verify='loose': it must be one of strict, fast, off"),
        ({"dense": "drop"}, "dense='drop': it must be one of leave, fuse, split"),
        ({"tune": 1}, "tune=1: it must be True or False"),
        ({"seed": -1}, "seed=-1: it must be a whole number, 0 or more"),
        ({"seed": None}, "seed=None: it must be a whole number"),
        ({"experts": True, "dense": "split"}, "experts=True: it must be a whole number, 1 or more"),
        ({"experts": 0, "dense": "split"}, "experts=0: it must be a whole number, 1 or more"),
        ({"dense": "split"}, "dense='split' needs experts=N"),
        ({"experts": 4}, "give dense='split' as well"),
        ({"experts": 4, "dense": "fuse"}, "give dense='split' as well"),
        ({"groups": "coactivation"}, "groups says how to split a dense FFN: give dense='split' and experts=N as well"),
        ({"groups": "kmeans"} | SPLIT, "groups='kmeans': it must be 'coactivation', or map name patterns"),
        ({"groups": {"*": [[0], ["a"]]}} | SPLIT, "groups['*'] must be lists of whole numbers, one list a group"),
        ({"groups": {"*": [[0, 1]]}} | SPLIT, "groups['*'] has 1 lists: give experts=2 lists, none empty"),
        ({"groups": {"*": [[0, 1], []]}} | SPLIT, "groups['*'] has 2 lists: give experts=2 lists, none empty"),
        ({"groups": {"*": [[0, 1], [1]]}} | SPLIT, "groups['*'] has neuron 1 twice: each neuron belongs to one group"),
        ({"hints": [1]}, "hints=[1]: it must map name patterns"),
        ({"progress": 3}, "progress=3: it must be a callable"),
        ({"dump": True}, "dump=True: it must be the path of a folder"),
        ({"dump": ""}, "dump='': it must be the path of a folder"),
        (
            {"only_passes": ("a", "b"), "skip_passes": "b"},
            "only_passes and skip_passes (or MOEOPT_SKIP_PASSES) both name b: drop it from one of them",
        ),
        ({"device": "toaster"}, "device='toaster' is not a device"),
        ({"dtype": "float99"}, "dtype='float99' is not a floating-point dtype"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not a floating-point dtype"),
    ],
)
def test_refusals(fields, text):
    with pytest.raises(UsageError) as err:
        Options.from_fields(None, fields)
    assert text in str(err.value)


def test_options_must_be_options():
    with pytest.raises(UsageError, match="it must be a moeopt.Options"):
        Options.from_fields({"seed": 1}, {})


def test_a_misspelt_variable_is_told(monkeypatch):
    monkeypatch.setenv("MOEOPT_SKIP_PASS", "drop_copies")
    with pytest.raises(
        UsageError, match=r"no environment variable MOEOPT_SKIP_PASS: did you mean MOEOPT_SKIP_PASSES\?"
    ):
        Options()
    monkeypatch.delenv("MOEOPT_SKIP_PASS")
    monkeypatch.setenv("MOEOPT_TESTS_SCALE", "2")  # of nobody's, and like none: it is another program's
    assert Options().skip_passes == ()


def test_every_variable_of_the_package_s_page_is_known():
    named = set(re.findall(r"^    (MOEOPT_\w+)", moeopt.options.__doc__, re.MULTILINE))
    assert named == set(OF_USERS)


def test_environment_fills_fields_that_are_not_given(monkeypatch):
    monkeypatch.setenv("MOEOPT_VERIFY", "fast")
    monkeypatch.setenv("MOEOPT_SEED", "11")
    monkeypatch.setenv("MOEOPT_FUEL", "2")
    monkeypatch.setenv("MOEOPT_DUMP", "graphs")
    options = Options.from_fields(None, {"seed": 4})
    assert (options.verify, options.seed, options.fuel, options.dump) == ("fast", 4, 2, "graphs")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("MOEOPT_SEED", "many", "MOEOPT_SEED is 'many'; it must be an integer, or unset"),
        ("MOEOPT_FUEL", "1.5", "MOEOPT_FUEL is '1.5'; it must be an integer, or unset"),
        ("MOEOPT_MEASURE", "perhaps", "MOEOPT_MEASURE is 'perhaps'; it must be on or off, or unset"),
        ("MOEOPT_NATIVE", "1", "MOEOPT_NATIVE is '1'; it must be on or off, or unset"),
        ("MOEOPT_VERIFY", "loose", "verify='loose': it must be one of strict, fast, off"),
    ],
)
def test_environment_refusals(monkeypatch, name, value, text):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as err:
        Options()
    assert text in str(err.value)


def test_say_reaches_progress():
    lines = []
    Options(progress=lines.append).say("capture: layers.0")
    Options().say("nobody listens")
    assert lines == ["capture: layers.0"]


@pytest.mark.parametrize("start", ["options", "load", "verify"])
def test_an_instruction_set_is_checked_before_anything_is_done(monkeypatch, tmp_path, start):
    begin = {
        "options": Options,
        "load": lambda: moeopt.load(tmp_path / "none"),
        "verify": lambda: moeopt.verify(tmp_path / "none"),
    }[start]
    monkeypatch.setenv("MOEOPT_NATIVE_ISA", "avx1024")
    with pytest.raises(
        UsageError,
        match="MOEOPT_NATIVE_ISA is 'avx1024'; it must be one of generic, avx2, avx2_vnni, avx512, .*or unset",
    ):
        begin()
    monkeypatch.setattr(environment, "isas_here", lambda: ["generic", "avx2"])
    monkeypatch.setenv("MOEOPT_NATIVE_ISA", "avx512")
    with pytest.raises(
        UsageError, match="is 'avx512', which this CPU does not run: it must be one of generic, avx2, or unset"
    ):
        begin()
    monkeypatch.setenv("MOEOPT_NATIVE_ISA", "avx2")
    assert Options().verify == "strict"


def test_the_names_of_instruction_sets_are_those_that_are_compiled():
    assert tuple(ISAS) == INSTRUCTION_SETS
