"""The pages as a browser shows them: rendered headless, plots measured, nothing fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from portaisys import report

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars",
]  # fmt: skip
# Put into a copy of the page: what each section's plot measures, once it is laid out.
PROBE = """<script>window.onload = () => { document.title = JSON.stringify([...document.querySelectorAll('section svg')].map(
  s => [s.parentElement.id, Math.round(s.getBoundingClientRect().width), Math.round(s.getBoundingClientRect().height), s.querySelectorAll('path').length])) }</script>"""


def search(trials=12, objectives=("validation_error", "latency_ms", "parameters")):
    rng = np.random.default_rng(0)
    done = [
        {
            "id": f"{index:04d}", "state": "done", "seconds": 1.5, "because": "",
            "params": {"train.learning_rate": float(rng.uniform(0.01, 0.3)), "model.channels.0": int(rng.choice([16, 32])), "train.optimizer": str(rng.choice(["sgd", "adamw"]))},
            "values": {name: float(rng.uniform(1, 9)) for name in objectives},
        }
        for index in range(trials)
    ]  # fmt: skip
    odd = {"id": "ffff", "state": "failed", "seconds": 0.1, "because": "train.learning_rate: <too large>", "params": {}, "values": None}
    return {
        "name": "digits", "seed": 0, "sampler": "TPE", "objectives": [{"name": name, "unit": "ms" if name == "latency_ms" else "", "mode": "min"} for name in objectives],
        "space": {"train.learning_rate": {"low": 0.01, "high": 0.3, "log": True}, "model.channels.0": [16, 32], "train.optimizer": ["sgd", "adamw"]},
        "trials": [*done, odd], "front": [trial["id"] for trial in done[-4:]], "best": done[-1]["id"] if done else None, "because": "the least latency_ms",
        "hypervolume": [{"trials": count + 1, "value": float(count)} for count in range(trials)], "reference": {}, "best_spec": "/runs/best.yaml",
    }  # fmt: skip


@pytest.mark.parametrize(("trials", "objectives"), [(0, ("latency_ms",)), (1, ("latency_ms",)), (1, ("latency_ms", "macs")), (5, ("latency_ms",))])
def test_a_search_of_any_size_has_a_page(tmp_path, trials, objectives):
    text = report.write_search(tmp_path / "report.html", search(trials, objectives)).read_text()
    assert "train.learning_rate: &lt;too large&gt;" in text and f"{trials + 1} trials" in text
    assert ('id="pareto"' in text) == (trials > 0)


def test_pages_ask_nothing_of_the_network(tmp_path):
    text = report.write_search(tmp_path / "report.html", search()).read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert all(address.startswith(("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org/", "https://matplotlib.org/")) for address in addresses)  # names of formats
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", text)


@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")
def test_the_plots_of_a_search_are_there_in_a_browser(tmp_path):
    page = report.write_search(tmp_path / "report.html", search())
    found = {name: (width, height, paths) for name, width, height, paths in measured(page, tmp_path)}
    assert found.keys() == {"pareto", "parallel", "hypervolume"}
    assert all(width > 400 and height > 150 and paths > 10 for width, height, paths in found.values()), found
    picture = screenshot(page, tmp_path)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100  # a blank page has one colour, text a few dozen greys
    red = (picture[..., 0] > 0.6) & (picture[..., 1] < 0.3) & (picture[..., 2] < 0.3)
    assert red.sum() > 200  # the front's points


def chromium(*arguments, folder):
    return subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


def measured(page: Path, folder: Path):
    copy = folder / "probe.html"
    copy.write_text(page.read_text().replace("</html>", PROBE + "</html>"))
    title = re.search(r"<title>(\[\[.*?\]\])</title>", chromium("--dump-dom", "--virtual-time-budget=3000", "--window-size=1200,900", copy.as_uri(), folder=folder))
    assert title
    return json.loads(title[1])


def screenshot(page: Path, folder: Path):
    file = folder / "page.png"
    chromium(f"--screenshot={file}", "--window-size=1200,1900", page.as_uri(), folder=folder)
    return matplotlib.image.imread(file)[..., :3]
