"""The library with the operator is proved in a child process: one that is wrong or crashes is never opened here."""

import shutil
import subprocess

import pytest

from moeopt.backends.onnxrt import custom_op
from moeopt.errors import UsageError
from moeopt.ops.native import build, library
from tests.backends.onnxrt.native import needs_operator

pytestmark = pytest.mark.one_isa  # a library is loaded in a child


@pytest.fixture(autouse=True)
def operator():
    needs_operator()


def compiled(folder, text):
    """A library of this C++ text."""
    source, made = folder / "other.cpp", folder / "other.so"
    source.write_text(text)
    subprocess.run([build.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    return made


def with_changed(folder, name, old, new, monkeypatch):
    """The library built from sources in which one line of one file is another."""
    sources = shutil.copytree(build.SOURCES, folder / "src")
    text = (sources / name).read_text()
    assert old in text
    (sources / name).write_text(text.replace(old, new))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O0"))  # right or wrong, and a fifth of the compiler's time
    build._identity.cache_clear()
    try:
        return build.build(("generic",), folder)
    finally:
        build._identity.cache_clear()


def test_the_library_of_this_machine_is_right():
    found = library.library()
    assert custom_op.ask_child(found.path, found.bit) == ""
    assert custom_op.native_library() == found


def test_a_library_that_crashes_ends_the_child_only(tmp_path):
    made = compiled(tmp_path, 'extern "C" void *RegisterCustomOps(void *, void *) { __builtin_trap(); }')
    assert "ends the process that runs it (signal" in custom_op.ask_child(made, 1)


def test_a_library_without_the_operator_is_told(tmp_path):
    made = compiled(tmp_path, 'extern "C" void *RegisterCustomOps(void *, void *) { return nullptr; }')
    said = custom_op.ask_child(made, 1)
    assert said.startswith("the operator is not right in onnxruntime") and "Experts" in said
    (tmp_path / "no.so").write_bytes(b"")
    assert custom_op.ask_child(tmp_path / "no.so", 1).startswith("the operator is not right in onnxruntime")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ort_op.cpp", "spec.weight_on_input = read", "spec.limits[1] += 0.25, spec.weight_on_input = read"),
        ("ort_api.h", ">(249)(of, number, is, out)", ">(250)(of, number, is, out)"),
        ("ort_api.h", ">(274)(of, f, total, batches, user)", ">(273)(of, f, total, batches, user)"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_wrong_number_or_a_wrong_place_in_the_table_is_found(tmp_path, monkeypatch, name, old, new):
    made = with_changed(tmp_path, name, old, new, monkeypatch)
    said = custom_op.ask_child(made, 1)
    assert "is not right in onnxruntime" in said or "ends the process" in said


def test_an_engine_without_the_operator_says_why(monkeypatch):
    import onnxruntime

    monkeypatch.setattr(custom_op, "library", lambda: None)
    monkeypatch.setattr(custom_op, "describe", lambda: "no C++ compiler was found; install one")
    with pytest.raises(UsageError, match="none here: no C\\+\\+ compiler was found; install one"):
        custom_op.register(onnxruntime.SessionOptions())


def test_options_of_the_user_s_own_serve_two_sessions(monkeypatch):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    custom_op.register(options)
    custom_op.register(options)
    assert options.get_session_config_entry("moeopt.isa") == str(library.library().bit)


def test_the_proof_is_remembered_for_this_library_and_runtime(monkeypatch, tmp_path):
    found = library.library()
    asked = []
    monkeypatch.setenv("MOEOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_op, "ask_child", lambda path, isa: asked.append(path) or "")
    for _ in range(2):
        custom_op.forget()
        assert custom_op.native_library() == found
    assert asked == [found.path]
    custom_op.forget()
    monkeypatch.setattr(custom_op.runtime(), "__version__", "99.0")
    custom_op.native_library()
    assert len(asked) == 2


def test_what_fails_is_asked_again_by_the_next_process(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_op, "ask_child", lambda path, isa: "block 0 differs")
    custom_op.forget()
    assert custom_op.native_library() is None and custom_op.why_not() == "block 0 differs"
    assert not list(tmp_path.rglob("proved-*"))
    custom_op.forget()
