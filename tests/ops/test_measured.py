"""What is measured once is remembered, by process and on disk, and never stands in the way."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from moeopt.ops import measured
from moeopt.ops.measured import fastest


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOEOPT_MEASURE", "on")
    measured._answers.clear()
    yield tmp_path / "cache"
    measured._answers.clear()


def clock(monkeypatch, seconds):
    """Ways that take what ``seconds`` says by name, on a clock that only they move; and the list of their calls."""
    now, calls = [0.0], []

    def way(name):
        def run():
            calls.append(name)
            now[0] += seconds[name]

        return run

    for name in ("thread_time", "perf_counter"):
        monkeypatch.setattr(measured.time, name, lambda: now[0])
    return (lambda: {name: way(name) for name in seconds}), calls


@pytest.mark.parametrize(
    ("seconds", "answer"),
    [
        ({"usual": 1.0, "other": 0.5}, "other"),
        ({"usual": 1.0, "other": 0.95}, "usual"),  # no real gain
        ({"usual": 1.0, "other": 2.0, "third": 0.3}, "third"),
    ],
)
def test_the_fastest_by_a_margin(seconds, answer, monkeypatch):
    ways, calls = clock(monkeypatch, seconds)
    assert fastest("q", ways, "usual") == answer
    assert len(calls) == len(seconds) * (measured.TURNS + 1)


@pytest.mark.parametrize(
    ("default", "other", "turns"),
    [
        (1e-3, 1e-3, measured.MORE_TURNS),
        (1e-3, 0.9e-3, measured.MORE_TURNS),  # it may be the quicker by the advantage, and not
        (1e-3, 0.7e-3, 0),
        (1e-3, 1.4e-3, 0),
        (1.0, 1.0, 0),  # that would take long
    ],
)
def test_where_it_is_close_short_ways_have_more_turns(default, other, turns, monkeypatch):
    ways, calls = clock(monkeypatch, {"usual": default, "other": other})
    fastest("q", ways, "usual")
    assert len(calls) == 2 * (measured.TURNS + 1 + turns)


@pytest.mark.parametrize(
    ("other", "answer"),
    [
        ((0.5, 110.0), "other"),  # the sum of the seconds would say "usual"
        ((0.95, 96.0), "usual"),  # a gain in each call, and none that counts
        ((0.5, 250.0), "usual"),  # half the seconds of one call, and more than twice those of the other
    ],
)
def test_each_call_of_a_way_counts_the_same_however_long_it_takes(other, answer, monkeypatch):
    seconds = {"usual": (1.0, 100.0), "other": other}
    ways, calls = clock(monkeypatch, {(name, i): took[i] for name, took in seconds.items() for i in range(2)})

    def by_name():
        each = ways()
        return {name: [each[name, i] for i in range(2)] for name in seconds}

    assert fastest("q", by_name, "usual") == answer
    assert calls[:4] == [("usual", 0), ("usual", 1), ("other", 0), ("other", 1)]


def test_a_way_with_one_call_that_this_machine_has_not_is_none(monkeypatch):
    ways, _ = clock(monkeypatch, {"usual": 1.0, "other": 0.5})

    def broken():
        raise RuntimeError("could not create a primitive descriptor")

    assert fastest("q", lambda: {"other": [ways()["other"], broken], "usual": ways()["usual"]}, "usual") == "usual"


def test_an_answer_is_asked_once_and_read_by_the_next_process(monkeypatch, folder):
    ways, calls = clock(monkeypatch, {"usual": 1.0, "other": 0.5})
    fastest("q", ways, "usual")
    known = len(calls)
    assert fastest("q", ways, "usual") == "other" and len(calls) == known
    measured._answers.clear()  # as a new process
    assert fastest("q", ways, "usual") == "other" and len(calls) == known
    assert fastest("another", ways, "usual") == "other" and len(calls) == 2 * known
    (file,) = (folder / "measured").iterdir()
    assert json.loads(file.read_text()) == {
        "machine": measured.machine(),
        "answers": {"q": "other", "another": "other"},
    }


@pytest.mark.parametrize("text", ["", "{", "[]", '{"answers": 3}', '{"machine": "another", "answers": {"q": "lie"}}'])
def test_an_unreadable_file_is_measured_anew(text, monkeypatch, folder):
    ways, _ = clock(monkeypatch, {"usual": 1.0, "other": 0.5})
    fastest("q", ways, "usual")
    (file,) = (folder / "measured").iterdir()
    file.write_text(text)
    measured._answers.clear()
    assert fastest("q", ways, "usual") == "other"
    assert json.loads(file.read_text())["answers"] == {"q": "other"}


def test_a_folder_that_cannot_be_made_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEOPT_CACHE", str(tmp_path / "file"))
    ways, _ = clock(monkeypatch, {"usual": 1.0, "other": 0.5})
    assert fastest("q", ways, "usual") == "other"


def test_off_means_the_default_and_no_call(monkeypatch, folder):
    monkeypatch.setenv("MOEOPT_MEASURE", "off")
    assert fastest("q", lambda: pytest.fail("nothing may be measured"), "usual") == "usual"
    assert not folder.exists()


def test_a_way_that_this_machine_has_not_is_none(monkeypatch):
    ways, _ = clock(monkeypatch, {"usual": 1.0, "other": 0.5})

    def broken():
        raise RuntimeError("could not create a primitive descriptor")

    assert fastest("q", lambda: {"broken": broken, **ways()}, "usual") == "other"
    assert fastest("only broken", lambda: {"usual": broken}, "usual") == "usual"


def test_a_way_may_itself_ask(monkeypatch):
    ways, _ = clock(monkeypatch, {"usual": 1.0, "other": 0.5})
    assert fastest("outer", lambda: ways() if fastest("inner", ways, "usual") == "other" else {}, "usual") == "other"


def test_the_machine_is_its_cpu_torch_threads_and_limits(monkeypatch):
    import torch

    about = measured.machine()
    assert measured.cpu_model() in about and torch.__version__ in about and "1 threads" in about
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert "7 threads" in measured.machine()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    measured._cpu.cache_clear()
    try:
        assert "ONEDNN_MAX_CPU_ISA=AVX2" in measured.machine()
    finally:
        measured._cpu.cache_clear()


def test_answers_of_another_cpu_kernel_are_not_believed(monkeypatch, tmp_path):
    from moeopt.ops.native import compile as commands

    before = measured.machine()
    assert commands.digest_of_sources() in before
    shutil.copytree(commands.SOURCES, tmp_path / "src")
    (tmp_path / "src" / "tile.h").write_text("// another order of the sums")
    other = commands.digest_of_sources(sources=tmp_path / "src")
    monkeypatch.setattr(measured, "digest_of_sources", lambda: other)
    measured._cpu.cache_clear()
    try:
        assert measured.machine() != before and other in measured.machine()
        assert measured._file(measured.machine()) != measured._file(before)
    finally:
        measured._cpu.cache_clear()


@pytest.mark.one_isa
def test_two_processes_and_many_writers_leave_a_whole_file(folder):
    code = (
        "import sys; from moeopt.ops.measured import fastest\n"
        "for i in range(20): fastest(f'{sys.argv[1]} {i}', lambda: {'usual': lambda: 0}, 'usual')"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, name], env=os.environ.copy()) for name in "ab"]
    assert [p.wait(timeout=120) for p in started] == [0, 0]
    (file,) = (folder / "measured").iterdir()  # no part file is left behind
    assert set(json.loads(file.read_text())["answers"].values()) == {"usual"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_measures_does_not_hang():
    with measured._lock:
        child = os.fork()
        if child == 0:
            try:
                fastest("q", lambda: {"usual": lambda: 0}, "usual")
            finally:
                os._exit(0)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
    assert done[0] == child and done[1] == 0


def test_ways_run_under_no_mode_that_would_slow_their_small_calls_down():
    seen = []

    def way():
        seen.append((torch._C._len_torch_function_stack(), torch.empty(1).device.type))

    fastest("modes", lambda: {"a": way}, "a")
    with torch.device("meta"):  # another default of the caller's is another mode, and not the measurement's business
        fastest("modes under a default device", lambda: {"a": way}, "a")
    plain, named = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert set(plain) == {(0, "cpu")} and {device for _, device in named} == {"cpu"}


def test_a_way_is_compared_turn_by_turn(monkeypatch):
    """What else runs on a machine slows a turn as a whole: each way's median alone may be of different turns."""
    now = [0.0]
    monkeypatch.setattr(measured.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])

    def quickest(advantage):
        turns = {"default": iter((1, 1.2, 2.4, 12, 9, 5)), "other": iter((1, 1, 2, 10, 20, 6))}

        def way(name):
            now[0] += next(turns[name])

        ways = {name: lambda name=name: way(name) for name in turns}
        return measured._measure(ways, "default", advantage)

    assert quickest(1.15) == "other"  # in three turns of five; the medians are 5 and 6
    assert quickest(1.25) == "default"


def test_ways_on_a_gpu_are_timed_by_its_events_and_asked_for_each_kind_of_gpu(monkeypatch):
    took, made, names = {"usual": 2.0, "other": 1.0}, [], ["H100", "L40S", "H100"]

    class Watch:
        def __init__(self, device, flush):
            made.append((device, flush))

        def seconds(self, call):
            return took[call()]

    monkeypatch.setattr(measured, "Stopwatch", Watch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[0])
    monkeypatch.setattr(measured, "measuring", lambda: True)
    monkeypatch.setattr(measured, "_answers", {})
    monkeypatch.setattr(measured, "cache_directory", lambda: None)
    device, ways = torch.device("cuda", 0), {name: lambda name=name: name for name in took}
    while names:
        assert measured.fastest("which?", lambda: ways, "usual", device=device) == "other"
        names.pop(0)
    assert made == [(device, measured.GPU_FLUSH)] * 2
    assert {question for _, question in measured._answers} == {"H100: which?", "L40S: which?"}
