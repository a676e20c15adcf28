"""Knowledge distillation: a loss that listens to a teacher, handed to the one training loop.

    logits       KL at a temperature beside cross entropy (Hinton et al. 2015, arXiv:1503.02531)
    features     hidden states through a learnt projection (FitNets, Romero et al. 2015, arXiv:1412.6550)
    attention    where a CNN is active (Zagoruyko & Komodakis 2017, arXiv:1612.03928), where a transformer's heads look
    relations    distances and angles between rows (RKD, Park et al. 2019, arXiv:1904.05068)

Layers are read by forward hooks within `Pupil.forward`, which gives what they show as outputs: DDP and torch.compile see ordinary tensors.
Each loss is a mean over rows, so that micro-batches may be cut in any way; only relations are between the rows of one micro-batch.
Knows models by the names of their modules, not where a teacher comes from.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portaisys.models.transformer import Attention
from portaisys.spec import Distill, Ramp, UserError

Names = Mapping[str, Sequence[str]]  # kind of loss -> names of layers
Pairs = Mapping[str, Sequence[tuple[str, str]]]  # kind of loss -> (the student's layer, the teacher's)
Seen = Mapping[str, Sequence[Tensor]]  # kind of loss -> what each layer shows
Teach = Callable[[Tensor], tuple[Tensor, Seen]]


# --- the loss -----------------------------------------------------------------------------------------------------


def distillation(teacher: nn.Module, options: Distill, pairs: Pairs | None = None) -> Distillation:
    """The loss of a student of `teacher`, which sees the same augmented rows; `pairs` as of `paired`."""
    return Distillation(shown_by(teacher, {kind: [other for _, other in found] for kind, found in (pairs or {}).items()}), options)


class Distillation:
    """alpha * T^2 * KL(teacher || student) at temperature T + (1 - alpha) * cross entropy + what `features`, `attention` and `relations` weigh.

    T^2 keeps the soft gradients' size when T changes (Hinton et al., section 2). Called with what a `Pupil`, or a model without layers to
    show, gave for `x`. `begin` says which step it is, from which the weights follow: they are no state, so a resumed run has the same.
    """

    def __init__(self, teach: Teach, options: Distill) -> None:
        self._teach, self._options = teach, options
        self._losses = dict(LOSSES)
        if options.relations:
            self._losses["relations"] = partial(relation_loss, distance=options.relations.distance, angle=options.relations.angle)
        self.begin(0, 1)

    def begin(self, step: int, total: int) -> None:
        """From here on the weights are those of this step, 0 to total - 1."""
        self.weights = {kind: at(options.weight, step, total) for kind, options in self._options.hidden.items()}
        self.alpha = at(self._options.alpha, step, total)

    def __call__(self, out: Any, x: Tensor, y: Tensor) -> Tensor:
        logits, seen = out if isinstance(out, tuple) else (out, {})
        with torch.no_grad():
            right, shown = self._teach(x)
        T, alpha = self._options.temperature, self.alpha
        soft = F.log_softmax(right.float() / T, 1)
        kl = F.kl_div(F.log_softmax(logits.float() / T, 1), soft, reduction="batchmean", log_target=True)
        value = alpha * T * T * kl + (1 - alpha) * F.cross_entropy(logits, y)
        with torch.autocast(x.device.type, enabled=False):
            for kind, weight in self.weights.items():
                each = [self._losses[kind](own.float(), other.float(), _real(x)) for own, other in zip(seen[kind], shown[kind], strict=True)]
                value = value + weight * torch.stack(each).mean()
        return value


def at(weight: float | Ramp, step: int, total: int) -> float:
    """A weight in a step: exactly `start` in the first and `end` in the last."""
    if not isinstance(weight, Ramp):
        return weight
    done = step / max(1, total - 1)
    done = {"linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[weight.schedule]
    return weight.start * (1 - done) + weight.end * done


def _real(x: Tensor) -> Tensor | None:
    """Of token ids [B, T] which are no padding; None of other rows."""
    return None if x.is_floating_point() or x.ndim != 2 else (x != 0).float()


def _over_positions(values: Tensor, real: Tensor | None) -> Tensor:
    """[B, T] or [B, ...] -> [B]: the mean over what is no padding."""
    if real is None or real.shape != values.shape:
        return values.flatten(1).mean(1)
    return (values * real).sum(1) / real.sum(1).clamp(min=1)


def _same_size(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures pooled to the smaller of the two sizes; what is no picture as it is."""
    if own.ndim != 4 or own.shape[2:] == other.shape[2:]:
        return own, other
    size = min(own.shape[2], other.shape[2]), min(own.shape[3], other.shape[3])
    return F.adaptive_avg_pool2d(own, size), F.adaptive_avg_pool2d(other, size)


def feature_loss(own: Tensor, other: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean squared error of hidden states of one width: [B, D], [B, T, D] or [B, C, H, W] (FitNets, equation 3)."""
    own, other = _same_size(own, other)
    squares = (own - other).square()
    return _over_positions(squares.mean(2) if own.ndim == 3 else squares, real).mean()


def attention_loss(own: Tensor, other: Tensor, real: Tensor | None = None) -> Tensor:
    """Squared distance of attention maps. [B, 1, H, W]: as vectors of length one (Zagoruyko & Komodakis, equation 2); [B, T, T]: of each token's, its mean over tokens."""
    if own.ndim == 4:
        maps = [F.normalize(each.flatten(1), dim=1) for each in _same_size(own, other)]
        return (maps[0] - maps[1]).square().sum(1).mean()
    return _over_positions((own - other).square().sum(2), real).mean()


RELATED = 128  # rows: angles are between three of them, so their memory grows with the cube


def relation_loss(own: Tensor, other: Tensor, real: Tensor | None = None, distance: float = 1.0, angle: float = 2.0) -> Tensor:
    """Huber loss of the distances between two rows, over their mean, and of the cosines at the second of three (RKD, sections 3.2.1 and 3.2.2).

    Widths may differ; positions are averaged before. Zero of a single row; angles of two.
    """
    a, b = (_embedded(each, real)[:RELATED] for each in (own, other))
    if len(a) < 2:
        return a.sum() * 0.0
    value = distance * F.smooth_l1_loss(_distances(a), _distances(b))
    return value + angle * F.smooth_l1_loss(_angles(a), _angles(b)) if len(a) > 2 else value


def _embedded(hidden: Tensor, real: Tensor | None) -> Tensor:
    """[B, D], the mean over positions that are no padding."""
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    weights = real if real is not None and real.shape == hidden.shape[:2] else hidden.new_ones(hidden.shape[:2])
    return (hidden * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


def _distances(rows_BD: Tensor) -> Tensor:
    """Between each two different rows, of which their mean is 1: [B * (B - 1)]."""
    apart: Tensor = torch.linalg.vector_norm(rows_BD[:, None] - rows_BD[None], dim=2)
    pairs = apart[~torch.eye(len(apart), dtype=torch.bool, device=apart.device)]
    return pairs / pairs.mean().clamp(min=1e-12)


def _angles(rows_BD: Tensor) -> Tensor:
    """Cosine at row j between the ways to rows i and k, [j, i, k]; zero where two of them are one."""
    ways = F.normalize(rows_BD[None] - rows_BD[:, None], dim=2)
    return ways @ ways.transpose(1, 2)


LOSSES: dict[str, Callable[..., Tensor]] = {"features": feature_loss, "attention": attention_loss, "relations": relation_loss}


# --- what layers show ---------------------------------------------------------------------------------------------


class Watch:
    """Keeps what layers show while a model runs, until it is `taken`.

    A copy of the model together with its Watch is as the original: the hooks hold what is kept as an argument, not in a closure.
    """

    def __init__(self, model: nn.Module, names: Names) -> None:
        self._names, self._seen = names, dict[tuple[str, str], Tensor]()
        self._hooks = [
            model.get_submodule(name).register_forward_hook(partial(_keep, self._seen, kind, name), with_kwargs=True)
            for kind, layers in names.items() for name in dict.fromkeys(layers)
        ]  # fmt: skip

    def taken(self) -> dict[str, list[Tensor]]:
        """What the layers showed since the last time. Raises UserError for one that did not run."""
        seen = dict(self._seen)
        self._seen.clear()
        for kind, layers in self._names.items():
            for name in layers:
                if (kind, name) not in seen:
                    raise UserError(f"compress.distill.{kind}.layers: {name!r} does not run when the model does; name a module that its forward calls")
        return {kind: [seen[kind, name] for name in layers] for kind, layers in self._names.items()}

    def end(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _keep(seen: dict[tuple[str, str], Tensor], kind: str, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    seen[kind, name] = (_map_of if kind == "attention" else _hidden)(f"compress.distill.{kind}.layers: {name!r}", module, args, kwargs, output)


def _hidden(who: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        raise UserError(f"{who} ({type(module).__name__}) gives {_told(output)}; name a module that gives [rows, width], [rows, tokens, width] or [rows, channels, height, width]")
    return output


def _map_of(who: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
    """[B, T, T], the mean over the heads, which fused kernels do not give: reckoned again. Of pictures [B, 1, H, W]."""
    if isinstance(module, Attention):
        return attention_map(module, *args, **kwargs)
    if isinstance(module, nn.MultiheadAttention):
        found = module.forward(*args, **{**kwargs, "need_weights": True, "average_attn_weights": True})[1]
        assert found is not None
        return found
    if isinstance(output, Tensor) and output.ndim == 4:
        return output.float().square().mean(1, keepdim=True)
    raise UserError(f"{who} ({type(module).__name__}) gives {_told(output)} and is no attention; name a multi-head attention, or a module that gives [rows, channels, height, width]")


def attention_map(module: Attention, x_BTD: Tensor, bias_B11T: Tensor | None = None) -> Tensor:
    """[B, T, T]: how much each token looks at each, on average over the heads."""
    q, k = (layer(x_BTD).unflatten(-1, (module.heads, module.head_dim)).transpose(1, 2) for layer in (module.q, module.k))
    scores_BHTT = (q @ k.transpose(-1, -2)).float() / math.sqrt(module.head_dim)
    map_BTT: Tensor = (scores_BHTT if bias_B11T is None else scores_BHTT + bias_B11T).softmax(-1).mean(1)
    return map_BTT


def _told(output: Any) -> str:
    return f"{list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def shown_by(teacher: nn.Module, names: Names) -> Teach:
    """A teacher that is a module: its logits and what its layers show. It is not trained."""
    teacher.eval().requires_grad_(False)
    watch = Watch(teacher, names)
    return lambda x: (teacher(x), watch.taken())


def answered_by(run: Callable[[Any], Any]) -> Teach:
    """A teacher that is a function of arrays, rows -> logits, such as an engine: it shows no layers."""
    return lambda x: (torch.from_numpy(run(x.cpu().contiguous().numpy())).to(x.device), {})


class Pupil(nn.Module):
    """A student while it is taught: in training it gives (logits, what its layers show), features projected to the teacher's width; else its logits.

    The projections are trained, saved in checkpoints and resumed like any of its weights, and left behind with it: the student is `student`.
    """

    def __init__(self, student: nn.Module, names: Names, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.student, self.projections = student, nn.ModuleList(projections)
        self._watch = Watch(student, names)

    def forward(self, x: Tensor) -> Any:
        logits = self.student(x)
        seen = self._watch.taken()
        if not self.training:
            return logits
        if self.projections:
            seen["features"] = [projection(hidden) for projection, hidden in zip(self.projections, seen["features"], strict=True)]
        return logits, seen


# --- which layers -------------------------------------------------------------------------------------------------


def paired(student: nn.Module, teacher: nn.Module, options: Distill) -> Pairs:
    """Which layers of the two are compared, by kind of loss. Raises UserError for names that are not there, or none where there is no default."""
    return {kind: _pairs(kind, chosen.layers, student, teacher) for kind, chosen in options.hidden.items()}


def _pairs(kind: str, layers: Any, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    where = f"compress.distill.{kind}.layers"
    if layers is None:
        own, other = _by_default(kind, student), _by_default(kind, teacher)
        for whose, model, found in (("student", student, own), ("teacher", teacher, other)):
            if not found:
                raise UserError(f"{where}: the {whose} has no stages to take by default; name modules, for example {', '.join(_some(model))}")
        return evenly(own, other)[-1:] if kind == "relations" else evenly(own, other)
    pairs = [*(layers.items() if isinstance(layers, Mapping) else zip(layers, layers, strict=True))]
    for name, other_name in pairs:
        _refuse_unknown(where, "student", name, student)
        _refuse_unknown(where, "teacher", other_name, teacher)
    return pairs


def _by_default(kind: str, model: nn.Module) -> list[str]:
    attentions = [name for name, module in model.named_modules() if isinstance(module, (Attention, nn.MultiheadAttention))]
    if kind == "attention" and attentions:
        return attentions
    return [stage[-1] for stage in stages(model)]


def stages(model: nn.Module) -> list[list[str]]:
    """Names of the blocks of each stage, in order, of a model whose blocks say (`stage`) whose they are; none of another."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(stage := getattr(module, "stage", None), int):
            found.setdefault(stage, []).append(name)
    return [found[stage] for stage in sorted(found)]


def evenly(own: Sequence[str], other: Sequence[str]) -> list[tuple[str, str]]:
    """Each of the student's with one of the teacher's as deep, the last with the last."""
    return [(name, other[-(-(number + 1) * len(other) // len(own)) - 1]) for number, name in enumerate(own)]


def _refuse_unknown(where: str, whose: str, name: str, model: nn.Module) -> None:
    found = dict(model.named_modules())
    if name not in found or not name:
        near = difflib.get_close_matches(name, found, n=3, cutoff=0.3) or _some(model)
        raise UserError(f"{where}: no module of the {whose} is called {name!r}; there are {', '.join(near)}, ...")


def _some(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name.count(".") == 1][:3] or [name for name, _ in model.named_modules()][1:4]


def projections(student: nn.Module, teacher: nn.Module, pairs: Pairs, x: Tensor) -> list[nn.Module]:
    """For each pair of features a 1x1 projection from the student's width to the teacher's, nothing where they are equal. `x`: rows to try with.

    Raises UserError for layers that cannot be compared.
    """
    own = _shown(student, {kind: [name for name, _ in found] for kind, found in pairs.items()}, x)
    other = _shown(teacher, {kind: [name for _, name in found] for kind, found in pairs.items()}, x)
    for kind in pairs:
        for pair, a, b in zip(pairs[kind], own[kind], other[kind], strict=True):
            if kind != "relations" and (a.ndim != b.ndim or (a.ndim == 3 and a.shape[1] != b.shape[1])):
                raise UserError(f"compress.distill.{kind}.layers: {pair[0]!r} of the student shows {list(a.shape)} and {pair[1]!r} of the teacher {list(b.shape)}, which have no positions in common; name others, or leave {kind} out")
    return [_projection(a, b) for a, b in zip(own.get("features", ()), other.get("features", ()), strict=True)]


def _projection(own: Tensor, other: Tensor) -> nn.Module:
    channels = 1 if own.ndim == 4 else -1
    a, b = own.shape[channels], other.shape[channels]
    if a == b:
        return nn.Identity()
    return nn.Conv2d(a, b, 1) if own.ndim == 4 else nn.Linear(a, b)


def _shown(model: nn.Module, names: Names, x: Tensor) -> dict[str, list[Tensor]]:
    watch = Watch(model, names)
    try:
        with torch.no_grad():
            model.eval()(x)
        return watch.taken()
    finally:
        watch.end()


# --- a student by spec --------------------------------------------------------------------------------------------


def inherit(student: nn.Module, teacher: nn.Module) -> tuple[int, int]:
    """Copy the teacher's weights into the student where shapes are equal; how many of its parameters' tensors, and of how many.

    Blocks come from every k-th of the teacher's (DistilBERT, Sanh et al. 2019, arXiv:1910.01108, section 3), stage by stage; the rest in its
    order, or by name where the two are not built alike. A layer of other widths stays as it is.
    """
    theirs, own = teacher.state_dict(), student.state_dict()
    taken = {name: theirs[other] for name, other in _counterparts(student, teacher).items() if own[name].shape == theirs[other].shape}
    student.load_state_dict({**own, **taken})
    names = dict(student.named_parameters()).keys()
    return len(names & taken.keys()), len(names)


def _counterparts(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Tensor of the student -> tensor of the teacher."""
    own, other = student.state_dict(), teacher.state_dict()
    blocks = _every_kth(stages(student), stages(teacher))
    found = {name: blocks[block] + name.removeprefix(block) for block in blocks for name in own if name.startswith(f"{block}.")}
    rest, other_rest = (_outside(model) for model in (student, teacher))
    if blocks and [name.rpartition(".")[2] for name in rest] == [name.rpartition(".")[2] for name in other_rest]:
        found |= zip(rest, other_rest, strict=True)
    else:
        found |= {name: name for name in rest}
    return {name: theirs for name, theirs in found.items() if theirs in other}


def _every_kth(own: Sequence[Sequence[str]], other: Sequence[Sequence[str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, stage in enumerate(own if other else ()):
        theirs = other[number * len(other) // len(own)]
        found |= {block: theirs[index * len(theirs) // len(stage)] for index, block in enumerate(stage)}
    return found


def _outside(model: nn.Module) -> list[str]:
    """Names of the tensors that are in no block."""
    blocks = tuple(f"{block}." for stage in stages(model) for block in stage)
    return [name for name in model.state_dict() if not name.startswith(blocks)] if blocks else [*model.state_dict()]
