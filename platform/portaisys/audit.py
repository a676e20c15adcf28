"""A published version judged again: its engines answer the test rows that its lineage names, and the same gate must come to the same verdict.

Nothing is believed that can be found again. Files are held against their digests, data against the digest of the test split, the spec against its own,
the count of looks against the ledger; the dense model is run again where its weights still lie, else the answers that the version keeps of it stand for it.
Stored verdicts are what is audited: they are read to be compared and for nothing else. Nothing is chosen by an audit, so it is no look at the
test split and the ledger does not count it. Speed is measured and shown, and not held against anybody: this may be another machine, or a busier one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portaisys import artifact, data, evaluate, models, spec
from portaisys.artifact import Artifact
from portaisys.data import Splits
from portaisys.determinism import threads
from portaisys.engine import recalled
from portaisys.engine.cache import Built, cache_of, get_or_build, load
from portaisys.fetch import verified_copy
from portaisys.gate import Decision
from portaisys.judge import BASELINE, REFERENCE, VERIFIED_ROWS, Baseline, Logits, baseline_of, quality, run_of, timed, unsound_at
from portaisys.launch import run_folder
from portaisys.registry import Registry, Version, open_registry
from portaisys.spec import Spec, Storage, UserError
from portaisys.weights import restore

# Verdicts that stand in a row only where they failed.
ONLY_FAILURES = ("soundness", "finite")


@dataclass(frozen=True)
class Line:
    """An engine of the version, then and now. `then`: its row as it was judged, empty when the version has none; `now`: verdicts by name, without speed's."""

    engine: str
    backend: str
    precision: str
    device: str
    then: Mapping[str, Any]
    accuracy: float
    latency_ms_p50: float
    now: Mapping[str, Decision]

    def actions(self) -> dict[str, tuple[str, str]]:
        """Name of a verdict -> its action then and now; "none" where there is none."""
        before = {name: str(found["action"]) for name, found in (self.then.get("verdicts") or {}).items() if name != "latency"}
        now = {name: str(found.action) for name, found in self.now.items()}
        return {name: (before.get(name, _unsaid(name)), now.get(name, _unsaid(name))) for name in dict.fromkeys([*before, *now])}


@dataclass(frozen=True)
class Audit:
    """`baseline`: what the engines were held against, in words; `differs`: what is not as it was judged, empty when the verdict stands."""

    version: str
    baseline: str
    test_rows: int
    looks: int
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    differs: tuple[str, ...]


def audit(reference: str, storage: Storage, data_path: str = "", tell: Callable[[str], None] = lambda text: None) -> Audit:
    """Judge "NAME@VERSION" again. `data_path`: where the data lies now, if not at the spec's data.path.

    Raises UserError for a version that cannot be audited: unknown, damaged, of other data, or without anything to hold it against.
    """
    opened = open_registry(storage, create=False)
    opened.verify_ledger()
    version = opened.resolve(reference)
    with tempfile.TemporaryDirectory() as folder:  # what was published, not a copy that this machine made when it was whole
        tell(f"fetching {version}, hashing its files")
        return _audited(opened, version, artifact.read(verified_copy(opened, version, Path(folder))), storage, data_path, tell)


def _audited(opened: Registry, version: Version, found: Artifact, storage: Storage, data_path: str, tell: Callable[[str], None]) -> Audit:
    about = json.loads(found.file("version.json").read_text())
    if not {"test", "reference"} <= about["lineage"].keys():
        raise UserError(f"{version}: was made without a test split (portaisys compile), so there is no verdict to reach again")
    if version.lineage.get("test") != about["lineage"]["test"]:
        raise UserError(f"{version}: the registry's lineage and the version's own name different test splits; one of the two was changed")
    options = _spec(opened, version, storage, data_path)
    tell("reading the data")
    splits = _same_rows(options, version, about)
    looks, differs = _looks(opened, about)
    with threads(options.engine.threads):
        baseline, dense, said, notes = _baseline(options, splits, found, about, tell)
        lines = _lines(options, splits, found, about, storage, baseline, dense, looks, tell)
    differs += [text for line in lines for text in _differences(line)] + _registry_differs(version, lines)
    return Audit(str(version), said, len(splits.test), looks, tuple(lines), (*notes, *_other_devices(lines)), tuple(differs))


def _spec(opened: Registry, version: Version, storage: Storage, data_path: str) -> Spec:
    tree = opened.spec_of(version)
    if data_path and "path" not in tree["data"]:
        raise UserError(f"{version}: source {tree['data']['source']} reads no file; leave --data out")
    if data_path:
        tree["data"]["path"] = data_path
    return spec.parse(tree).model_copy(update={"storage": storage})


def _same_rows(options: Spec, version: Version, about: Mapping[str, Any]) -> Splits:
    wanted = about["lineage"]["test"]
    remedy = "bring the data back" + (", or say where it lies (--data)" if hasattr(options.data, "path") else "")
    try:
        splits = data.load(options.data)
    except UserError as error:
        raise UserError(f"{version}: the rows that it was judged on cannot be read: {error}; {remedy}") from None
    if splits.test_digest != wanted:
        raise UserError(
            f"{version}: was judged on the test split {wanted[:12]}, and data.source={options.data.source} gives {splits.test_digest[:12]} now: other rows, "
            f"on which no verdict can be held against the old one; {remedy}"
        )
    return splits


def _looks(opened: Registry, about: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The count that the version was judged at, which must be one that the ledger went through with its candidates."""
    counts, told = opened.looks_of(about["lineage"]["test"], [*about["lineage"].values()]), about.get("looks")
    if told in counts:
        return int(told), []
    if not counts:
        return int(told or 1), ["the ledger holds no look of this version's candidates at this test split"]
    return max(counts), [f"looks at the test split: the version says {told} and the ledger {' or '.join(map(str, counts))}"]


# --- the baseline -------------------------------------------------------------------------------------------------


def _baseline(
    options: Spec, splits: Splits, found: Artifact, about: Mapping[str, Any], tell: Callable[[str], None]
) -> tuple[Baseline, Callable[[Logits], Logits] | None, str, list[str]]:
    """The dense model's answers, the model where it is here, which of the two in words, and notes."""
    kept = baseline_of(found.file(BASELINE)) if BASELINE in found.files else None
    weights, notes = _weights(run_folder(options), about["lineage"]["reference"])
    if weights:
        tell(f"the dense model answers {len(splits.test):,} test rows")
        dense = models.predictor(restore(options, splits, weights))
        logits = evaluate.predict_rows(dense, splits.test.x, options.export.max_batch)
        baseline = Baseline(evaluate.answered(logits), logits)
        if kept and (others := int((kept.answers != baseline.answers).sum())):
            notes.append(f"the dense model answers {others:,} of {len(splits.test):,} test rows otherwise than it did when the version was judged")
        return baseline, dense, f"the dense model, run again from its weights in {weights}", notes
    if kept is None:
        raise UserError(f"the weights of the dense model ({about['lineage']['reference'][:12]}) are not in {run_folder(options)} and the version keeps no answers of it; run its spec again where they are")
    said = f"the dense model's answers as the version keeps them (its weights are not in {run_folder(options)}); logits of the first {len(kept.logits)} rows"
    return kept, None, said, notes


def _weights(folder: Path, digest: str) -> tuple[Path | None, list[str]]:
    """The artifact of that digest among those of a run, whole; notes of a damaged one."""
    for manifest in sorted(folder.glob(f"*/{artifact.MANIFEST}")):
        if json.loads(manifest.read_text()).get("digest") == digest:
            try:
                return artifact.read(manifest.parent, verify=True).path, []
            except UserError as error:
                return None, [f"the dense model's weights are not used: {error}"]
    return None, []


# --- the engines --------------------------------------------------------------------------------------------------


def _lines(
    options: Spec, splits: Splits, found: Artifact, about: Mapping[str, Any], storage: Storage, baseline: Baseline, dense: Callable[[Logits], Logits] | None,
    looks: int, tell: Callable[[str], None],
) -> list[Line]:  # fmt: skip
    x, y = splits.test.x, splits.test.y
    with ExitStack() as opened:
        engines, built = {}, {}
        for precision in about["precisions"]:
            tell(f"building {precision} with {about['backends'][precision]}")
            settings = recalled(about, precision, about["threads"])
            built[precision] = get_or_build(found.file(f"{precision}.onnx"), about["backends"][precision], settings, cache_of(storage))
            engines[precision] = load(built[precision], settings)
            opened.callback(engines[precision].close)
        runs = {precision: run_of(engine) for precision, engine in engines.items()}
        tell(f"scoring {len(runs)} engines on {len(y):,} test rows")
        logits = {precision: evaluate.predict_rows(run, x, options.export.max_batch) for precision, run in runs.items()}
        unsound = {precision: unsound_at(engine, np.ascontiguousarray(x[:VERIFIED_ROWS]), options) for precision, engine in engines.items()}
        ms = timed(({REFERENCE: dense} if dense else {}) | runs, x[:1], options)
    lines = []
    for precision, name in about["engines"].items():
        now = quality(options.gate, options.export.tolerance, name, logits[precision], baseline, y, splits.labels, looks)
        now |= {"soundness": Decision("fail", unsound[precision], {})} if unsound[precision] else {}
        lines.append(_line(name, precision, built[precision], about["verdicts"], evaluate.accuracy(logits[precision], y), float(np.median(ms[precision])), now))
    return lines


def _line(name: str, precision: str, built: Built, rows: Sequence[Mapping[str, Any]], accuracy: float, ms: float, now: Mapping[str, Decision]) -> Line:
    then = next((row for row in rows if (row["engine"], row["backend"], row["status"]) == (name, built.backend, "executed")), {})
    return Line(name, built.backend, precision, built.device, then, accuracy, ms, now)


# --- what differs -------------------------------------------------------------------------------------------------


def _unsaid(name: str) -> str:
    return "pass" if name in ONLY_FAILURES else "none"


def _differences(line: Line) -> list[str]:
    if not line.then:
        return [f"{line.engine} on {line.backend}: the version holds it without a verdict"]
    because = {name: f": {found.because}" for name, found in line.now.items()}
    return [f"{line.engine} on {line.backend}: {name} was {then} and is {now}{because.get(name, '')}" for name, (then, now) in line.actions().items() if then != now]


def _registry_differs(version: Version, lines: Sequence[Line]) -> list[str]:
    """The registry's word is about the first engine, which is the one served."""
    bad = [name for name, (_, now) in lines[0].actions().items() if now != "pass"]
    if version.verdict == "pass" and bad:
        return [f"the registry says pass, and {lines[0].engine} does not pass on {', '.join(bad)}"]
    return []


def _other_devices(lines: Sequence[Line]) -> list[str]:
    return [
        f"{line.engine} was judged on {line.then['device']} and ran on {line.device}: verdicts are per backend, precision and device, so a difference may be the device's"
        for line in lines
        if line.then and line.then["device"] != line.device
    ]
