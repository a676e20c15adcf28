"""Structured pruning: channels, neurons, heads and blocks leave, so that every engine gets faster, not only sparse ones.

widths.py says what may leave and how important it is; here is how much leaves, until the targets are met. Accuracy comes back in
distill.py. Of data it is handed rows of the train and calibration splits, never of the test split.
"""

from __future__ import annotations

import copy
import difflib
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portaisys import evaluate, models
from portaisys.compress import widths as parts
from portaisys.compress.widths import FAULTS, Bounds, Losses, Width
from portaisys.data import Split, Splits
from portaisys.engine import Engine, Options, backend
from portaisys.export import INPUT, export
from portaisys.spec import Export, Prune, UserError
from portaisys.step import score

# No width is left below an eighth of what it was: beyond that a model is another one, not a pruned one.
DEEPEST = 0.875
ROWS, BATCH = 256, 16  # to measure importance with; Taylor's is sharper of small batches
GRID = 64  # of one-shot pruning: how finely its fraction is found
LATENCY_ROUNDS, LATENCY_WARMUP = 100, 10
TARGETS = ("mac_cut", "parameter_cut", "latency_cut")
NAMED = 8  # layers that an error lists


@dataclass(frozen=True)
class Evidence:
    """What is known beside the weights: losses of rows that were trained on and of others, and how much of the dense model's latency a model saves (a fraction)."""

    train: Losses | None = None
    held_out: Losses | None = None
    latency_cut: Callable[[nn.Module], float] | None = None


def prune(model: nn.Module, shape: Sequence[int], options: Prune, classes: int, splits: Splits | None = None, seed: int = 0) -> dict[str, Any]:
    """Prune a classifier in place until all targets are met. `splits`: for what `options` asks of rows; which, is drawn from `seed`.

    Returns figures: parameters, macs, the cuts as fractions, how many channels, neurons, heads and blocks were `removed`, and `skipped`:
    the layers that cannot be pruned, with the reason. Raises UserError, naming the best reachable cuts, when the structure allows no more.
    """
    evidence = Evidence()
    if splits is not None:
        longest = shape[0] if splits.vocabulary else 0
        latency = latency_cut(model, splits.calibration.x, most_tokens=longest) if options.latency_cut else None
        evidence = Evidence(losses_on(splits.train, seed), losses_on(splits.calibration, seed), latency)
    return prune_module(model, (models.example(model, shape, 2),), options, evidence, head=classes)


def prune_module(model: nn.Module, inputs: Sequence[Tensor], options: Prune, evidence: Evidence = Evidence(), *, head: int = 0) -> dict[str, Any]:
    """The same of any module of tensors in, one tensor out: `inputs` are two rows or more of each, and the answers keep their shape.

    `head`: how wide the layer is that gives the answers, when there is one; without, the last dimension of the answers.
    """
    case = _case(model, inputs, options, evidence, head)
    before = models.count_inputs(model, _row(inputs))
    if not before["macs"]:
        raise UserError("compress.prune: this model has no multiply-accumulates that can be counted, so none can be cut; remove the step")
    _find_unfit(case)
    if options.ratios is not None:
        small = _State(copy.deepcopy(case.dense))
        _narrow(small, case, _by_stage(small.model, options.ratios))
        _check(small.model, case)
        now = _cuts(small.model, case, before)
    else:
        small, now = (_at_once if options.steps == 1 else _in_steps)(case, before)
    models.rebuild(model, small.model.state_dict())
    removed = {kind: small.removed[kind] for kind in options.what}
    return {**now, "removed": removed, "skipped": _skipped(case)}


def _skipped(case: _Case) -> list[str]:
    return [f"{name}: {reason}" for name, reason in sorted(case.bounds.unfit.items())]


def rehearse(model: nn.Module, shape: Sequence[int], options: Prune, classes: int) -> None:
    """Prune an untrained model in place about as the trained one will be. Raises UserError, as `prune` would, for names and for targets beyond what the structure allows.

    Neither latency nor how much the blocks hold that would leave is known of it, so neither is refused here.
    """
    inputs = (models.example(model, shape, 2),)
    known = {"importance": "norm", "latency_cut": 0.0} | ({} if options.ratios else {"steps": 1}) | ({"mac_cut": 0.0, "parameter_cut": 0.0} if "blocks" in options.what else {})
    evidence = Evidence(held_out=lambda tried: iter([tried(*inputs).square().mean()]))
    prune_module(model, inputs, options.model_copy(update=known), evidence, head=classes)


# --- the two schedules --------------------------------------------------------------------------------------------


@dataclass
class _State:
    """A copy on its way: what has left of it, by kind and, of blocks, by name."""

    model: nn.Module
    removed: Counter[str] = field(default_factory=Counter)
    gone: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Case:
    """What does not change on the way. `full`: units of a layer in the dense model; `blocks`: names of those that may leave."""

    dense: nn.Module
    inputs: Sequence[Tensor]
    answers: torch.Size
    options: Prune
    evidence: Evidence
    bounds: Bounds
    blocks: list[str]
    full: dict[str, int]


def _in_steps(case: _Case, before: dict[str, int]) -> tuple[_State, dict[str, Any]]:
    """A little more leaves with every step; the first that meets the targets is the result."""
    small, now = _State(copy.deepcopy(case.dense)), {}
    for step in range(1, case.options.steps + 1):
        _take(small, case, step / float(case.options.steps) * DEEPEST)
        _check(small.model, case)
        now = _cuts(small.model, case, before)
        if _met(now, case.options):
            return small, now
    raise _out_of_reach(small.model, case, now)


def _at_once(case: _Case, before: dict[str, int]) -> tuple[_State, dict[str, Any]]:
    """The least fraction of a grid that meets the targets, found by halving; importance is that of the dense model."""

    def at(point: int) -> tuple[_State, dict[str, Any]]:
        small = _State(copy.deepcopy(case.dense))
        _take(small, case, point / GRID * DEEPEST)
        _check(small.model, case)
        return small, _cuts(small.model, case, before)

    best, low, high = at(GRID), 0, GRID
    if not _met(best[1], case.options):
        raise _out_of_reach(best[0].model, case, best[1])
    while high - low > 1:
        tried = at(middle := (low + high) // 2)
        low, high, best = (low, middle, tried) if _met(tried[1], case.options) else (middle, high, best)
    return best


def _cuts(model: nn.Module, case: _Case, before: dict[str, int]) -> dict[str, Any]:
    """Latency, which costs an export, is measured only where it decides."""
    now = models.count_inputs(model, _row(case.inputs))
    found: dict[str, Any] = {**now, "mac_cut": 1 - now["macs"] / before["macs"], "parameter_cut": 1 - now["parameters"] / before["parameters"]}
    if case.options.latency_cut and all(found[target] >= getattr(case.options, target) for target in TARGETS[:2]):
        found["latency_cut"] = _latency_cut(model, case)
    return found


def _latency_cut(model: nn.Module, case: _Case) -> float:
    if case.evidence.latency_cut is None:
        raise UserError("compress.prune.latency_cut: there are no rows to measure latency with; take mac_cut, or hand in a measure of latency")
    return case.evidence.latency_cut(model)


def _met(now: dict[str, Any], options: Prune) -> bool:
    return all(now.get(target, 0.0) >= getattr(options, target) for target in TARGETS)


def _out_of_reach(model: nn.Module, case: _Case, now: dict[str, Any]) -> UserError:
    options, best = case.options, dict(now)
    if options.latency_cut and "latency_cut" not in best:
        best["latency_cut"] = _latency_cut(model, case)
    asked = [target for target in TARGETS if getattr(options, target)]
    bounds = _listed([f"round_to {options.round_to}", f"what [{', '.join(options.what)}]", *([f"keep [{', '.join(options.keep)}]"] if options.keep else [])])
    return UserError(
        f"compress.prune: {_listed(f'{target} {getattr(options, target)}' for target in asked)} cannot be met; this model reaches at most "
        f"{_listed(f'{target} {best[target]:.3f}' for target in asked)} with {bounds}{_in_the_way(case)}; ask for less, or let more leave"
    )


def _in_the_way(case: _Case) -> str:
    """Which layers could not be pruned and why, as the notes of a pruning that succeeds say it."""
    skipped = _skipped(case)
    more = f"; and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    return f"; it left as it was {'; '.join(skipped[:NAMED])}{more}" if skipped else ""


def _listed(items: Any) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else str(last)


# --- what leaves --------------------------------------------------------------------------------------------------


def _take(small: _State, case: _Case, share: float) -> None:
    """Have this fraction of the dense model's blocks leave, and of the units of each layer, or of all layers together."""
    if "blocks" in case.options.what:
        while len(small.gone) < int(len(case.blocks) * share):
            name = parts.least_block(small.model, [block for block in case.blocks if block not in small.gone], case.evidence.held_out)
            parts.leave_out(small.model, name)
            small.gone.append(name)
            small.removed["blocks"] += 1
    if {*case.options.what} - {"blocks"}:
        _narrow(small, case, lambda width: share)


def _narrow(small: _State, case: _Case, share: Callable[[Width], float]) -> None:
    found = _widths(small.model, case, _terms(small.model, case))
    by_layer = case.options.scope == "layer" or case.options.ratios is not None
    leaving = [_of_layer(width, _full(width, case), share(width)) for width in found] if by_layer else _of_all(found, case, share)
    for width, units in zip(found, leaving, strict=True):
        small.removed[width.kind] += width.cut(units) if units else 0


def _widths(model: nn.Module, case: _Case, terms: parts.Terms = parts.norm) -> list[Width]:
    found = parts.widths(model, case.inputs, case.options, case.bounds, terms)
    for width in found:
        size = _full(width, case)
        for name in width.tied:
            case.full.setdefault(name, size)
    return found


def _full(width: Width, case: _Case) -> int:
    """Units in the dense model; a group goes by the name of another of its layers once a block has left."""
    return next((case.full[name] for name in width.tied if name in case.full), len(width.scores))


def _terms(model: nn.Module, case: _Case) -> parts.Terms:
    kind = case.options.importance
    if kind == "norm":
        return parts.norm
    losses = case.evidence.train if kind == "taylor" else case.evidence.held_out
    if losses is None:
        raise UserError(f"compress.prune.importance: {kind} is measured on rows and there are none; take norm, or hand rows in")
    return (parts.taylor if kind == "taylor" else parts.activation)(model, losses)


def _of_layer(width: Width, full: int, share: float) -> list[int]:
    size = len(width.scores)
    stay = min(size, int(full * (1 - share)))
    return torch.argsort(width.scores)[: size - _rounded(stay, width)].tolist() if stay < size else []


def _of_all(found: Sequence[Width], case: _Case, share: Callable[[Width], float]) -> list[list[int]]:
    """Of all layers' units of a kind those of least importance, but of no layer more than `DEEPEST`."""
    leaving: list[list[int]] = [[] for _ in found]
    for kind in case.options.what:
        ours = [index for index, width in enumerate(found) if width.kind == kind]
        stay = int(sum(_full(found[index], case) for index in ours) * (1 - max((share(found[index]) for index in ours), default=0.0)))
        most = {index: len(found[index].scores) - max(1, math.ceil(_full(found[index], case) * (1 - DEEPEST))) for index in ours}
        ranked = sorted((float(value), index, unit) for index in ours for unit, value in enumerate(found[index].scores))
        excess = len(ranked) - stay
        for _, index, unit in ranked:
            if excess > 0 and len(leaving[index]) < most[index]:
                leaving[index].append(unit)
                excess -= 1
    # Rounding takes the next ones in order.
    return [torch.argsort(width.scores)[: len(width.scores) - _rounded(len(width.scores) - len(units), width)].tolist() if units else [] for width, units in zip(found, leaving, strict=True)]


def _rounded(stay: int, width: Width) -> int:
    """Down to a multiple, but not to nothing."""
    return min(len(width.scores), max(stay - stay % width.multiple, width.multiple))


def _by_stage(model: nn.Module, ratios: Sequence[float]) -> Callable[[Width], float]:
    """The ratio of each width by the stage of the architecture that its layers say (`stage`) they belong to."""
    staged = {module: stage for module in model.modules() if isinstance(stage := getattr(module, "stage", None), int)}
    stages = 1 + max(staged.values(), default=-1)
    if stages != len(ratios):
        raise UserError(f"compress.prune.ratios: {len(ratios)} ratios for a model of {stages} stages; give one a stage, or take mac_cut, which needs none")
    names = {module: name for name, module in model.named_modules()}
    of = {name: ratios[stage] for module, stage in staged.items() for name, _ in module.named_modules(prefix=names[module])}
    return lambda width: next((of[name] for name in width.tied if name in of), 0.0)


# --- what must stay -----------------------------------------------------------------------------------------------


def _case(model: nn.Module, inputs: Sequence[Tensor], options: Prune, evidence: Evidence, head: int) -> _Case:
    dense = copy.deepcopy(model).eval().requires_grad_(True)  # autograd is how the graph is found
    with torch.no_grad():
        answers = dense(*inputs).shape
    bounds = Bounds(frozenset(_fixed(dense, head or answers[-1])), frozenset(_kept(dense, options.keep)), _of_other_types(dense, options))
    found = parts.blocks(dense, inputs, bounds) if "blocks" in options.what else []
    return _Case(dense, inputs, answers, options, evidence, bounds, found, {})


def _row(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x[:1] for x in inputs)


def _fixed(model: nn.Module, classes: int) -> Iterator[str]:
    """The layer that gives the answers, and attention's projections, whose widths are tied to the heads."""
    heads = [name for name, m in model.named_modules() if getattr(m, "out_features", getattr(m, "out_channels", None)) == classes]
    yield from heads[-1:]
    for name, _ in parts.attentions(model):
        yield from (f"{name}.{part}" for part in parts.PROJECTIONS)


def _kept(model: nn.Module, keep: Sequence[str]) -> Iterator[str]:
    """All modules at or below those of `keep`."""
    names = [name for name, _ in model.named_modules() if name]
    for wanted in keep:
        if wanted not in names:
            near = difflib.get_close_matches(wanted, names, 3, 0.5) or [name for name in names if name.endswith(f".{wanted}")] or names[:3]
            raise UserError(f"compress.prune.keep: {wanted!r} is no layer of this model; the nearest are {', '.join(near)}")
        yield from (name for name in names if name == wanted or name.startswith(f"{wanted}."))


def _of_other_types(model: nn.Module, options: Prune) -> dict[str, str]:
    """torch's layers with weights whose widths cannot be changed, and attention whose heads cannot leave."""
    found = {}
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if isinstance(module, nn.MultiheadAttention) and "heads" not in options.what:
            continue
        if own and type(module).__module__.startswith("torch.nn.") and not models.can_follow(module):
            found[name] = f"a {type(module).__name__} cannot be pruned"
    return found


def _fault(model: nn.Module, case: _Case) -> str:
    """Why a model no longer gives what it gave; empty when it does."""
    try:
        with torch.no_grad():
            answers = model(*case.inputs)
    except FAULTS as error:
        return f"the model no longer runs ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
    return "" if answers.shape == case.answers else f"the model gives {tuple(answers.shape)} in place of {tuple(case.answers)}"


def _check(model: nn.Module, case: _Case) -> None:
    if fault := _fault(model, case):
        raise _broken(fault)


def _broken(fault: str) -> UserError:
    return UserError(f"compress.prune: pruning broke the model's output: {fault}; end it with a Linear or Conv2d that gives the logits, or name in keep what must stay")


def _find_unfit(case: _Case) -> None:
    """Try a little of everything on a copy, each part on its own when that fails, and note what breaks the model.

    Raises UserError when it is the last layer: then what gives the answers is not known.
    """
    for block in [*case.blocks]:
        trial = copy.deepcopy(case.dense)
        parts.leave_out(trial, block)
        if fault := _fault(trial, case):
            case.blocks.remove(block)
            case.bounds.unfit[block] = f"without it {fault}"
    if not {*case.options.what} - {"blocks"} or not _trial_fault(case, None):
        return
    last = [name for name, module in case.dense.named_modules() if isinstance(module, (nn.Linear, *models.CONVOLUTIONS))][-1]
    names = [(width.name, width.tied) for width in _widths(copy.deepcopy(case.dense), case)]
    for name, tied in names:
        if fault := _trial_fault(case, name):
            if last in tied:
                raise _broken(fault)
            case.bounds.unfit[name] = f"without a part of it {fault}"
    if fault := _trial_fault(case, None):
        raise _broken(fault)


def _trial_fault(case: _Case, name: str | None) -> str:
    """What goes wrong when one width, or with None each, loses as little as it can."""
    trial = copy.deepcopy(case.dense)
    try:
        for width in _widths(trial, case):
            least = (len(width.scores) % width.multiple) or width.multiple
            if name in (None, width.name) and least < len(width.scores):
                width.cut(range(least))
    except FAULTS as error:
        return f"it cannot be cut ({type(error).__name__}: {error})"
    return _fault(trial, case)


# --- rows and latency ---------------------------------------------------------------------------------------------


def losses_on(rows: Split, seed: int) -> Losses:
    """Cross entropy of up to `ROWS` rows drawn from `seed`, batch by batch."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:ROWS]

    def losses(model: nn.Module) -> Iterator[Tensor]:
        for start in range(0, len(chosen), BATCH):
            x, y = rows.take(chosen[start : start + BATCH])
            yield F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))

    return losses


def latency_cut(dense: nn.Module, rows: Any, *, most_tokens: int = 0) -> Callable[[nn.Module], float]:
    """A function: which fraction of `dense`'s latency a model saves. `rows`: [>= 2, ...]; the first is what is timed.

    Of the fp32 files in ONNX Runtime, batch 1, one thread: the two run in turns, and their medians are compared. torch's own times mislead: its overhead per layer hides what narrower layers save.
    """
    first = _engine(dense, rows, most_tokens)

    def cut(model: nn.Module) -> float:
        second, feeds = _engine(model, rows, most_tokens), {INPUT: np.ascontiguousarray(rows[:1])}
        ms = evaluate.latency({"dense": lambda: first.run(feeds), "pruned": lambda: second.run(feeds)}, LATENCY_ROUNDS, LATENCY_WARMUP, seed=0)
        second.close()
        return 1 - float(np.median(ms["pruned"]) / np.median(ms["dense"]))

    return cut


def _engine(model: nn.Module, rows: Any, most_tokens: int) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(copy.deepcopy(model).eval(), rows, Export(), path, most_tokens=most_tokens)
        engine: Engine = backend("onnxruntime").load(path, Options(provider="cpu"))
        return engine


# --- one layer at a time ------------------------------------------------------------------------------------------


def sensitivity(model: nn.Module, shape: Sequence[int], rows: Split, classes: int, fraction: float = 0.5, keep: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What each layer costs and saves when it alone, with what is tied to it, loses `fraction` of its channels, neurons or heads of least norm; nothing is trained.

    A row a layer: `layer`, `action` ("pruned"), `drop` of the accuracy on `rows` (validation) and `macs_saved`, both fractions.
    """
    options = Prune(what=("channels", "neurons", "heads"), round_to=1, keep=tuple(keep))
    case = _case(model, (models.example(model, shape, 2),), options, Evidence(), classes)
    _find_unfit(case)
    accuracy, before, table = score(case.dense, rows), models.count(model, shape)["macs"], []
    for index, _ in enumerate(_widths(copy.deepcopy(case.dense), case)):
        small = copy.deepcopy(case.dense)
        width = _widths(small, case)[index]
        if (units := _of_layer(width, len(width.scores), fraction)) and width.cut(units):
            table.append({"layer": width.name, "action": "pruned", "drop": accuracy - score(small, rows), "macs_saved": 1 - models.count(small, shape)["macs"] / before})
    return table
