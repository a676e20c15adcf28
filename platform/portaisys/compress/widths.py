"""What may leave of a model's layers, and how important each part of it is: channels and neurons with all that is tied to them, heads, blocks.

Torch-Pruning finds what is tied (Fang et al. 2023, DepGraph, arXiv:2301.12900). Knows losses as numbers, neither data nor targets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from portaisys.models import CONVOLUTIONS, Skip, can_follow
from portaisys.spec import Prune, UserError

Losses = Callable[[nn.Module], Iterable[Tensor]]  # of a model, batch by batch: the mean loss of its rows
Terms = Callable[[Any, str], Tensor | None]  # of a layer and its side, "out" or "in": what each channel there counts, None where it has no say

# What a model may raise that was given layers which do not fit.
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)


@dataclass(frozen=True)
class Bounds:
    """By name of a module: whose outputs stay as wide as they are, where nothing changes, and what cannot be pruned, with the reason (it grows)."""

    fixed: frozenset[str]
    kept: frozenset[str]
    unfit: dict[str, str]


@dataclass(frozen=True)
class Width:
    """Units of one layer that may leave, each with what is tied to it: `kind` is channels, neurons or heads.

    `scores`: importance of each, [units]; `multiple`: as many stay, or a multiple; `tied`: names of the layers that lose outputs with it;
    `cut(units)` has them leave, in place, and returns how many did.
    """

    name: str
    kind: str
    scores: Tensor
    multiple: int
    tied: tuple[str, ...]
    cut: Callable[[Sequence[int]], int]


def widths(model: nn.Module, inputs: Sequence[Tensor], options: Prune, bounds: Bounds, terms: Terms) -> list[Width]:
    """All that `options.what` names and `bounds` allow, of a model in evaluation mode; what cannot be pruned is noted in `bounds.unfit`."""
    found = [*_groups(model, inputs, options, bounds, terms)] if {"channels", "neurons"} & {*options.what} else []
    return found + ([*_heads(model, bounds, terms, options)] if "heads" in options.what else [])


# --- channels and neurons -----------------------------------------------------------------------------------------


def _groups(model: nn.Module, inputs: Sequence[Tensor], options: Prune, bounds: Bounds, terms: Terms) -> Iterator[Width]:
    graph, names = traced(model, inputs), {module: name for name, module in model.named_modules()}
    fixed = [module for module, name in names.items() if name in bounds.fixed]
    for group in [*graph.get_all_groups(fixed, (nn.modules.conv._ConvNd, nn.Linear))]:
        layers = {names[dep.target.module]: dep.target.module for dep, _ in group if dep.target.module in names}
        outs = {names[dep.target.module]: dep.target.module for dep, _ in group if dep.target.module in names and graph.is_out_channel_pruning_fn(dep.handler)}
        kind = "channels" if any(isinstance(layer, nn.modules.conv._ConvNd) for layer in outs.values()) else "neurons"
        root = names[group[0].dep.target.module]
        if kind not in options.what or bounds.kept & layers.keys() or root in bounds.unfit:
            continue
        if reason := _unfit(graph, group, layers):
            bounds.unfit[root] = reason
        elif (scores := _scores(graph, group, terms)) is not None:
            parts = max(_parts(layer) for layer in layers.values())
            scores = _evened(scores.reshape(parts, -1).mean(0), options)
            multiple = options.round_to // math.gcd(options.round_to, parts)
            yield Width(root, kind, scores, multiple, (*outs,), _cut_of(graph, group, parts, len(scores)))


def traced(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """The graph of what depends on what. Raises UserError when the model's forward cannot be followed."""
    try:
        return torch_pruning.DependencyGraph().build_dependency(model, tuple(inputs), forward_fn=lambda net, x: net(*x), verbose=False)
    except FAULTS as error:
        raise UserError(f"compress.prune: what depends on what in this model cannot be followed: {error}; remove the step, or set what to [blocks]") from error


def _unfit(graph: Any, group: Any, layers: Mapping[str, nn.Module]) -> str:
    """Why the channels of a group cannot leave; empty when they can."""
    for name, layer in layers.items():
        if not can_follow(layer):
            return f"tied to {name}, a {type(layer).__name__}, which cannot be pruned"
    # Heads as wide as the layer allows would take channels over from each other, and nothing would fail.
    if any(mark in str(getattr(dep.target.module, "_grad_fn", "")) for dep, _ in group for mark in ("ScaledDotProduct", "Softmax")):
        return "its channels are those of an attention whose heads are not known"
    parts = max(_parts(layer) for layer in layers.values())
    for dep, idxs in group:
        layer = dep.target.module
        if not isinstance(layer, (nn.Linear, *CONVOLUTIONS, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            continue
        whole = graph.get_out_channels(dep.target) if graph.is_out_channel_pruning_fn(dep.handler) else graph.get_in_channels(dep.target)
        if not 0 <= min(idxs) <= max(idxs) < whole:
            return f"tied to a {type(layer).__name__} in a way that cannot be followed"
        # One unit leaves in every part at once, so all parts must be among what leaves, and lie alike in all that is tied.
        if _parts(layer) > 1 and (parts % _parts(layer) or not len(idxs) == len(group[0].idxs) == whole):
            return f"tied to a {type(layer).__name__} of {_parts(layer)} groups, which do not lie as they would have to"
    return ""


def _parts(layer: Any) -> int:
    """Groups of channels that must stay of one size."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    depthwise = isinstance(layer, CONVOLUTIONS) and layer.groups == layer.out_channels
    return 1 if depthwise else getattr(layer, "groups", 1)


def _cut_of(graph: Any, group: Any, parts: int, size: int) -> Callable[[Sequence[int]], int]:
    root, handler = group[0].dep.target.module, group[0].dep.handler

    def cut(units: Sequence[int]) -> int:
        chosen = graph.get_pruning_group(root, handler, [part * size + unit for part in range(parts) for unit in units])
        if not graph.check_pruning_group(chosen):
            return 0
        chosen.prune()
        return parts * len(units)

    return cut


def _scores(graph: Any, group: Any, terms: Terms) -> Tensor | None:
    """The mean over the layers of a group of what its channels count in each, [channels]; None where no layer has a say."""
    total, layers = torch.zeros(len(group[0].idxs)), 0
    for item in group:
        local = terms(item.dep.target.module, "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in")
        if local is not None and None not in item.root_idxs:
            total.scatter_add_(0, torch.tensor(item.root_idxs), local[item.idxs].to(total))
            layers += 1
    return total / layers if layers else None


def _evened(scores: Tensor, options: Prune) -> Tensor:
    """Of mean 1 in each layer, so that layers can be compared; Taylor's are of one kind already, a change of the loss."""
    return scores if options.importance == "taylor" else scores / scores.mean().clamp(min=1e-30)


# --- heads --------------------------------------------------------------------------------------------------------


def attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attention whose heads can leave: an int `head_dim`, linear layers q, k, v and out, and a forward that takes the number of heads from the weights."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "head_dim", None), int) and all(isinstance(getattr(module, part, None), nn.Linear) for part in PROJECTIONS):
            yield name, module


PROJECTIONS = ("q", "k", "v", "out")


def _heads(model: nn.Module, bounds: Bounds, terms: Terms, options: Prune) -> Iterator[Width]:
    for name, module in attentions(model):
        if bounds.kept & {name, *(f"{name}.{part}" for part in PROJECTIONS)} or name in bounds.unfit:
            continue
        layers = [getattr(module, part) for part in PROJECTIONS]
        found = [terms(layer, "in" if layer is module.out else "out") for layer in layers]
        if said := [term for term in found if term is not None]:
            scores = torch.stack(said).mean(0).reshape(-1, module.head_dim).sum(1)
            yield Width(name, "heads", _evened(scores, options), 1, (name,), _cut_heads(module))


def _cut_heads(attention: Any) -> Callable[[Sequence[int]], int]:
    def cut(units: Sequence[int]) -> int:
        rows = [head * attention.head_dim + row for head in units for row in range(attention.head_dim)]
        for layer in (attention.q, attention.k, attention.v):
            torch_pruning.prune_linear_out_channels(layer, rows)
        torch_pruning.prune_linear_in_channels(attention.out, rows)
        return len(units)

    return cut


# --- importance ---------------------------------------------------------------------------------------------------


def norm(layer: Any, side: str) -> Tensor | None:
    """Squares of the weights, summed over each channel: the group L2 norm."""
    return _by_channel(layer.weight.detach().abs().pow(2), layer, side) if _counts(layer) else None


def taylor(model: nn.Module, losses: Losses) -> Terms:
    """|sum of weight x gradient over each channel|, added up over batches: to first order how the loss changes without it (Molchanov et al. 2019, arXiv:1906.10771).

    Batch by batch, since in a trained model the gradients of all rows cancel; of norms with their shift, as there. Weight by weight, or of all
    rows together, it costs more accuracy in every case measured (docs/log.md, 2026-11-28).
    """
    found: dict[tuple[Any, str], Tensor] = {}
    layers = [layer for layer in model.modules() if _counts(layer)]
    for loss in losses(model):
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for layer in layers:
            if layer.weight.grad is None:
                continue
            for side in ("out", "in"):
                found[layer, side] = found.get((layer, side), torch.zeros(())) + _change(layer, side).abs()
    model.zero_grad(set_to_none=True)
    return lambda layer, side: found.get((layer, side))


def _change(layer: Any, side: str) -> Tensor:
    change = _by_channel((layer.weight * layer.weight.grad).detach(), layer, side)
    shifts = layer.weight.ndim == 1 and layer.bias is not None and layer.bias.grad is not None
    return change + (layer.bias * layer.bias.grad).detach() if shifts else change


def activation(model: nn.Module, losses: Losses) -> Terms:
    """Variance of each channel's activation over rows and places, times the squares of the weights that read it (An et al. 2024, FLAP, arXiv:2312.11983).

    What does not vary is a constant, which training puts back into a bias.
    """
    sums: dict[Any, Tensor] = {}  # [2, channels]: of means and of mean squares, batch by batch
    batches = 0

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].float()
        channel = x.ndim - 1 if isinstance(module, nn.Linear) else 1
        others = [dim for dim in range(x.ndim) if dim != channel]
        sums[module] = sums.get(module, torch.zeros(())) + torch.stack([x.mean(others), x.square().mean(others)])

    hooks = [module.register_forward_pre_hook(keep) for module in model.modules() if isinstance(module, (nn.Linear, *CONVOLUTIONS))]
    with torch.no_grad():
        for _ in losses(model):
            batches += 1
    for hook in hooks:
        hook.remove()

    def terms(layer: Any, side: str) -> Tensor | None:
        if side == "out" or layer not in sums or not _counts(layer):
            return None
        mean, square = sums[layer] / batches
        varies: Tensor = (square - mean.square()).clamp(min=0)
        return varies * _by_channel(layer.weight.detach().square(), layer, "in")

    return terms


def _counts(layer: Any) -> bool:
    """A depthwise convolution has no say: it has a few weights a channel, and what it reads and gives is the same channel."""
    depthwise = isinstance(layer, CONVOLUTIONS) and layer.groups == layer.out_channels > 1
    return isinstance(layer, (nn.Linear, *CONVOLUTIONS, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)) and layer.weight is not None and not depthwise


def _by_channel(values: Tensor, layer: Any, side: str) -> Tensor:
    if values.ndim == 1:
        return values
    if side == "out":
        return values.flatten(1).sum(1)
    return values.transpose(0, 1).flatten(1).sum(1).repeat(getattr(layer, "groups", 1))


# --- blocks -------------------------------------------------------------------------------------------------------


def blocks(model: nn.Module, inputs: Sequence[Tensor], bounds: Bounds) -> list[str]:
    """Names of the residual blocks that may leave, the innermost: called once in a forward, and giving what has the shape of their first input."""
    calls: dict[str, list[Any]] = {}
    modules = {name: module for name, module in model.named_modules() if name and any(True for _ in module.children())}
    hooks = [module.register_forward_hook(_recorder(calls, name), with_kwargs=True) for name, module in modules.items()]
    with torch.no_grad():
        model(*inputs)
        for hook in hooks:
            hook.remove()
        found = [name for name, seen in calls.items() if len(seen) == 1 and _is_residual(modules[name], *seen[0])]
    inner = [name for name in modules if name in found and not any(other.startswith(f"{name}.") for other in found)]
    return [name for name in inner if not any(kept == name or kept.startswith(f"{name}.") for kept in bounds.kept)]


def _recorder(calls: dict[str, list[Any]], name: str) -> Callable[..., None]:
    return lambda module, args, named, output: calls.setdefault(name, []).append((args, named, output))


def _is_residual(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> bool:
    """Whether its answer still follows its input once its matrices and kernels give nothing."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not isinstance(output, Tensor) or output.shape != x.shape or not x.is_floating_point():
        return False
    still = copy.deepcopy(block)
    for parameter in still.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    other = x + torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    return not torch.allclose(still(x, *args[1:], **named), still(other, *args[1:], **named))


def leave_out(model: nn.Module, name: str) -> nn.Module:
    """Take a block out, in place; returns it."""
    block = model.get_submodule(name)
    model.set_submodule(name, Skip())
    return block


def least_block(model: nn.Module, names: Sequence[str], losses: Losses | None) -> str:
    """The block without which the loss is least, or without rows the one of the least norm."""
    return min(names, key=lambda name: _loss_without(model, name, losses) if losses else sum(float(p.detach().pow(2).sum()) for p in model.get_submodule(name).parameters()))


def _loss_without(model: nn.Module, name: str, losses: Losses) -> float:
    block = leave_out(model, name)
    with torch.no_grad():
        loss = sum(float(part) for part in losses(model))
    model.set_submodule(name, block)
    return loss
