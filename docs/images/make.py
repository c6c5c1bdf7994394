"""The pictures of the README: pages that moeopt writes, in a headless browser. PYTHONPATH=. python docs/images/make.py

Needs chromium (apt-get install chromium), transformers, and the trained models of tests/fixtures.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import moeopt
from examples.quickstart import TwoOfEight
from tests.trained_lm import load, text

HERE = Path(__file__).parent
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
         "--disable-sync --no-first-run --hide-scrollbars").split()  # fmt: skip


def shoot(page: Path, name: str, width: int, height: int) -> None:
    browser = shutil.which("chromium") or "google-chrome"
    with tempfile.TemporaryDirectory() as profile:
        size = [f"--window-size={width},{height}", f"--user-data-dir={profile}", f"--screenshot={HERE / name}"]
        subprocess.run([browser, *FLAGS, *size, page.as_uri()], check=True, capture_output=True)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        report = moeopt.optimize(TwoOfEight().eval(), torch.randn(2, 16, 64)).report
        page = report.to_html(Path(folder) / "report.html")
        page.write_text(page.read_text().replace(f"{HERE.parents[1]}/", ""))  # source lines as seen from the checkout
        shoot(page, "report.png", 960, 1000)
        batches = [{"input_ids": rows, "use_cache": False} for rows in text().split(4)]
        profile = moeopt.profile(load("moe"), batches, measure=False)  # times are not for a picture
        shoot(profile.to_html(Path(folder) / "load.html"), "load.png", 960, 660)


if __name__ == "__main__":
    main()
