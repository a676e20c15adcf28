"""README's bash blocks are run as a reader would run them, on a copy of the checkout. `make test` is only looked up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The tracked files with their times (so that make finds the environment set up), and the environment itself."""
    folder = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / "home").mkdir()
    return folder


def run(text, folder):
    text = text.replace("make test ", "make --dry-run test ")
    environment = {**os.environ, "HOME": str(folder / "home"), "COLUMNS": "160"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not (ROOT / ".venv/ready").exists(), reason="needs `make setup`")
def test_the_blocks_of_the_readme_run(checkout):
    first, *others = BLOCKS
    shown = run(first, checkout)
    for words in ("dense torch", "int8", "built", "Served 200 requests over HTTP by digits@1", "report.html"):
        assert words in shown
    assert (checkout / "runs/digits/report.html").exists()
    again = run("make demo", checkout)
    assert "Finished before and reused: train" in again
    assert "Engines: judged before, not built again" in again
    for block in others:
        run(block, checkout)
