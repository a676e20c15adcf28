"""The pages as a browser shows them: rendered headless, plots measured, nothing fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from portaisys import artifact, data, report, spec

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


def measured(page: Path, folder: Path, probe: str = PROBE):
    copy = folder / "probe.html"
    copy.write_text(page.read_text().replace("</html>", probe + "</html>"))
    title = re.search(r"<title>(\[\[.*?\]\])</title>", chromium("--dump-dom", "--virtual-time-budget=3000", "--window-size=1200,900", copy.as_uri(), folder=folder))
    assert title
    return json.loads(title[1])


def screenshot(page: Path, folder: Path):
    file = folder / "page.png"
    chromium(f"--screenshot={file}", "--window-size=1200,1900", page.as_uri(), folder=folder)
    return matplotlib.image.imread(file)[..., :3]


# --- the page of a run ----------------------------------------------------------------------------------------------

# Into a copy of the page: how many pictures are there once they are laid out, and how many were decoded.
PICTURES = """<script>window.onload = () => { const all = [...document.querySelectorAll('figure img')];
  document.title = JSON.stringify([['pictures', all.length, all.filter(i => i.naturalWidth >= 8 && i.getBoundingClientRect().width > 40).length]]) }</script>"""


def row_of(engine, right, **more):
    """A row of the judge, as JSON holds it."""
    figures = {"drop": 0.02, "low": 0.005, "high": 0.03, "margin": 0.05, "corrected_confidence": 0.975}
    verdicts = {"accuracy": {"action": "pass", "because": "accuracy drop", "figures": figures}, "class recall": {"action": "fail", "because": "worst class '3'", "figures": figures}}
    verdicts["latency"] = {"action": "pass", "because": "faster", "figures": {"ratio": 0.8, "low": 0.7, "high": 0.9}}
    return {
        "engine": engine, "backend": "onnxruntime", "precision": "fp32", "device": "cpu", "status": "executed", "parameters": 9000, "macs": 400_000, "size_bytes": 40_000,
        "accuracy": right, "latency_ms_p50": 0.2, "latency_ms_p99": 0.3, "verdicts": verdicts, "admissible": True, "because": "passed", "reused": False, "notes": [], **more,
    }  # fmt: skip


EVIDENCE = {"test_rows": 600, "macro_f1": 0.93, "recall": {"0": 1.0, "3": 0.9}, "rows_not_finite": 0, "max_abs": 0.1, "agreement": 0.97, "macro_f1_drop": {"drop": 0.02, "low": 0.01, "high": 0.03, "confidence": 0.95}}
SENSITIVITY = [{"layer": f"stage.{index}.conv", "action": "int8", "drop": 0.01 * (index - 1), "latency_ratio": 1 - 0.1 * index} for index in range(4)]


def run_page(folder, test, *, evidence=EVIDENCE, sensitivity=SENSITIVITY, answers=True, compress=()):
    """A page of a run with these parts, on the first rows of a split."""
    rows = [row_of("dense torch", 0.97, backend="torch", verdicts=None, admissible=False, **evidence), row_of("dense fp32", 0.97, verdicts={}, **evidence), row_of("small fp32", 0.95, parameters=3000, macs=100_000, latency_ms_p50=0.1, **evidence)]
    scores = {
        "train": {"validation_accuracy": 0.97, "parameters": 9000, "macs": 400_000}, "prune-1": {"validation_accuracy": 0.95, "parameters": 3000, "macs": 100_000} | ({"sensitivity": sensitivity} if sensitivity else {}),
        "quantize": {"parameters": 3000, "macs": 100_000, "onnx_bytes_fp32": 40_960, "onnx_bytes_int8": 11_264},
        "judge": {"rows": rows, "looks": 2}, "version": {"admitted": ["small fp32"], "size_bytes": 40_960},
    }  # fmt: skip
    made = {}
    for name, found in scores.items():
        with artifact.writing(folder / name, kind=name, key=name, parents={}, spec={}) as draft:
            draft.scores.update(found)
            if name == "judge" and answers:
                y = test.y.astype(np.int32)
                before, now = y.copy(), y.copy()
                classes = len(test.table.labels)
                before[:3], now[3:23] = (before[:3] + 1) % classes, (now[3:23] + 1 + np.arange(20) % (classes - 1)) % classes
                np.savez(draft.path / "answers.npz", y=y, dense_torch=before, small_fp32=now)
        made[name] = artifact.read(folder / name)
    logs = {"train": [{"epoch": 1, "loss": 1.0, "validation_accuracy": 0.9}, {"epoch": 2, "loss": 0.5, "validation_accuracy": 0.97}]}
    return report.write(folder / "report.html", spec.parse({"name": "page", "compress": compress}), made, logs, "page@1", test if answers else None)


def test_a_page_says_what_changed_from_dense_to_served_with_bounds(tmp_path, digits):
    text = run_page(tmp_path, digits.test).read_text()
    for words in ("drop 2.00 points, between 0.50 and 3.00 (each at 97.5 %)", "drop 2.00 points, between 1.00 and 3.00 (each at 95 %)", "-66.7%", "-75.0%", "-50.0%", "100.00% to 100.00%", "class recall: fail"):
        assert words in text, words
    assert "right before, wrong now: 20 of 600" in text and "wrong before, right now: 3 of 600" in text and text.count("<figcaption>") == report.FLIPS + 3
    assert "small fp32, which is served, now" in text and report._compressed([row_of("dense fp32", 0.9, verdicts={}), row_of("int8", 0.8)], "dense fp32") == "int8"
    assert "-2.00 points" in text and "3 k (33%)" in text and "0.1 M (25%)" in text


def test_what_quantization_bought_is_the_size_of_its_file(tmp_path, digits):
    text = run_page(tmp_path, digits.test).read_text()
    table = text[text.index("<table id='steps'>") :]
    head, train, _, quantize, _, version, *_ = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")])
    column = re.findall(r"<th.*?>(.*?)</th>", head).index("file")
    assert [re.findall(r"<td.*?>(.*?)</td>", row)[column] for row in (train, quantize, version)] == ["-", "11 KiB (28% of fp32)", "40 KiB"]


def test_of_many_pairs_of_classes_some_are_shown_and_it_says_of_how_many(tmp_path, digits):
    text = run_page(tmp_path, digits.test).read_text()
    wrong = len({(int(label), index % 9) for index, label in enumerate(digits.test.y[3:23])})
    assert wrong > report.PAIRS and text.count(" pairs of classes") == 1 and f"<h3>right before, wrong now: 20 of 600</h3><p>8 of {wrong} pairs of classes" in text


def test_a_step_of_the_spec_stands_on_the_page_without_the_steps_that_it_is_not(tmp_path, digits):
    text = run_page(tmp_path, digits.test, compress=[{"prune": {"mac_cut": 0.3}}, {"quantize": {}}]).read_text()
    shown = text[text.index("<h2>Spec</h2>") :]
    assert "\n- prune:\n" in shown and "\n- quantize:\n" in shown and not re.search(r"(prune|sparsify|distill|quantize): null", shown)


# --- plots, as matplotlib holds them --------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by name."""
    drawn, svg = {}, report._svg
    monkeypatch.setattr(report, "_svg", lambda figure, name, label: drawn.update({name: figure}) or svg(figure, name, label))
    return drawn


def test_a_layer_that_is_slower_compressed_is_red_whatever_its_accuracy(figures):
    from matplotlib.colors import to_hex

    layers = [{"layer": "worse", "action": "int8", "drop": 0.02, "latency_ratio": 0.9}, {"layer": "slower", "action": "int8", "drop": 0.0, "latency_ratio": 1.3}, {"layer": "untimed", "action": "int8", "drop": -0.01, "latency_ratio": None}]
    report._sensitivity({"quantize": SimpleNamespace(scores={"sensitivity": layers})})
    drops, ratios = figures["sensitivity-quantize"].axes
    assert [[to_hex(bar.get_facecolor()) for bar in axis.patches] for axis in (drops, ratios)] == [["#b3261e", "#136f2d", "#136f2d"], ["#136f2d", "#b3261e", "#136f2d"]]
    assert [axis.lines[-1].get_xdata()[0] for axis in (drops, ratios)] == [0.0, 1.0]


NEAR = [row_of("dense torch", 0.97, backend="torch"), row_of("dense fp32", 0.97), row_of("small fp32", 0.969, latency_ms_p50=0.201, macs=399_000), row_of("int8", 0.969, latency_ms_p50=0.199), row_of("int8", 0.968, backend="openvino")]


@pytest.mark.parametrize("rows", [NEAR, NEAR[:1], [*NEAR, row_of("tiny", 0.5, macs=900, latency_ms_p50=0.01)]])
def test_each_name_of_the_pareto_plot_is_tied_to_its_point_and_each_axis_has_a_scale(figures, rows):
    report._pareto(rows, 0.95)
    FigureCanvasAgg(figure := figures["pareto"]).draw()
    for axis, (key, factor) in zip(figure.axes, (("latency_ms_p50", 1), ("macs", 1e-6)), strict=True):
        low, high = axis.get_xlim()
        assert sum(low <= tick <= high for tick in axis.get_xticks()) >= 2
        wanted = {(row["engine"] if row["engine"] != "int8" or len(rows) < 4 else f"int8 ({row['backend']})", (row[key] * factor, 100 * row["accuracy"])) for row in rows}
        assert {(label.get_text(), label.xy) for label in axis.texts} == wanted and all(label.arrow_patch for label in axis.texts)
        boxes = [Text.get_window_extent(label) for label in axis.texts]  # an annotation's own is with its line
        assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
        assert all(box.x0 >= axis.bbox.x1 and box.x1 <= figure.bbox.x1 for box in boxes)  # beside the points, and on the page


def test_texts_whose_answer_changed_are_shown_as_text(tmp_path):
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tlabel\n" + "".join(f"{'good' if index % 2 else 'bad'} film number {index} <b>\t{'pos' if index % 2 else 'neg'}\n" for index in range(400)))
    splits = data.load(spec.Text(source="text", kind="file", path=str(rows), validation_rows=40, calibration_rows=40, test_rows=100, vocabulary=300))
    text = run_page(tmp_path, splits.test).read_text()
    assert text.count("<blockquote>") == report.FLIPS + 3 and "&lt;b&gt;" in text and "<b>\t" not in text and "before pos" in text and "<img" not in text


@pytest.mark.parametrize("missing", [{"evidence": {}}, {"sensitivity": []}, {"answers": False}])
def test_a_page_without_a_part_leaves_it_out(tmp_path, digits, missing):
    text = run_page(tmp_path, digits.test, **missing).read_text()
    assert ("id='right-before-wrong-now'" in text) == ("answers" not in missing)
    assert ('id="sensitivity-prune-1"' in text) == ("sensitivity" not in missing)
    assert ("macro-F1" in text) == ("evidence" not in missing)
    assert 'id="pareto"' in text and "What each step bought" in text


def test_pictures_of_three_channels_are_in_colour_and_flat_rows_are_numbers():
    assert report._picture(np.zeros((3, 4, 4)), "a < b").startswith('<img alt="a &lt; b" src="data:image/png;base64,')
    assert report._picture(np.arange(10.0), "") == "<code>0, 1, 2, 3, 4, 5, 6, 7, …</code>"


@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")
def test_plots_and_pictures_of_a_run_are_there_in_a_browser(tmp_path, digits):
    page = run_page(tmp_path, digits.test)
    found = {name: (width, height, paths) for name, width, height, paths in measured(page, tmp_path)}
    assert found.keys() == {"pareto", "intervals", "sensitivity-prune-1", "curves"}
    assert all(width > 400 and height > 100 and paths > 10 for width, height, paths in found.values()), found
    assert measured(page, tmp_path, PICTURES) == [["pictures", report.FLIPS + 3, report.FLIPS + 3]]
    assert not re.search(r"<(script|link|iframe)\b|@import|url\((?!#)|src=\"(?!data:image/png)", page.read_text())
    assert len(np.unique(screenshot(page, tmp_path).reshape(-1, 3), axis=0)) > 100
