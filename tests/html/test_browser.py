"""The page in a real browser: it lays out, shows its words, and is no wider than a telephone."""

import shutil
import struct
import subprocess

import pytest

from tests.html import pages

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium here: apt-get install chromium")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
         "--disable-sync --no-first-run --disable-dev-shm-usage --hide-scrollbars").split()  # fmt: skip
PROBE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1);
parent.postMessage(`${document.documentElement.scrollWidth} of ${innerWidth}: ` + wide.map(e => e.tagName).join(), "*");
</script></body>"""
TELEPHONE = """<!doctype html><title>waits</title>
<iframe src="report.html" width="400" height="900" style="border:0"></iframe>
<script>onmessage = e => document.title = e.data</script>"""  # a browser's own window is never as narrow


def browse(path, folder, *flags):
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_nothing_sticks_out_on_a_narrow_screen(tmp_path):
    path = pages.report().to_html(tmp_path / "report.html", profile=pages.load(), timings={"original": 0.02})
    text = path.read_text()
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert policy in text
    path.write_text(text.replace(policy, policy + "; script-src 'unsafe-inline'").replace("</body>", PROBE))
    (tmp_path / "outer.html").write_text(TELEPHONE)
    seen = browse(tmp_path / "outer.html", tmp_path, "--virtual-time-budget=5000", "--dump-dom")
    assert "<title>400 of 400: </title>" in seen, seen[:600]


def test_a_picture_of_it_can_be_taken(tmp_path):
    path, shot = pages.report().to_html(tmp_path / "report.html", profile=pages.load()), tmp_path / "shot.png"
    browse(path, tmp_path, "--window-size=800,600", f"--screenshot={shot}")
    data = shot.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (800, 600)
    assert len(data) > 20_000  # an empty page of this size has about 4 kB
