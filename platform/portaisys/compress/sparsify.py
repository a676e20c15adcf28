"""2:4 sparsity: of every four weights in a row of input channels the two smallest become zero, which TensorRT's sparse kernels skip.

Mishra et al. 2021, arXiv:2104.08378: prune once by magnitude, then train on with the zeros held. It is faster in wide layers on
Ampere and later only, with `engine.sparse`, and nowhere else; so it is no step of any recipe by default. Knows nothing of data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from portaisys.spec import Sparsify, UserError


def sparsify(model: nn.Module, options: Sparsify) -> dict[str, Any]:
    """Zero two of every four weights of the layers that can have it, in place. Returns how many layers and weights.

    Raises UserError when `options.keep` names no layer, or no layer is left.
    """
    layers = dict(_layers(model))
    unknown = sorted({*options.keep} - {*layers})
    if unknown:
        raise UserError(f"compress.sparsify.keep: {unknown[0]!r} is none of the layers that 2:4 applies to: {', '.join(layers)}")
    chosen = {name: layer for name, layer in layers.items() if name not in options.keep}
    if not chosen:
        raise UserError("compress.sparsify: no Linear or Conv2d with a multiple of four input channels is left; remove the step")
    for layer in chosen.values():
        layer.weight.data.mul_(mask_of(layer.weight.data))
    return {"sparse_layers": len(chosen), "sparse_weights": sum(layer.weight.numel() for layer in chosen.values())}


def mask_of(weight: Tensor) -> Tensor:
    """Ones where a weight [out, in, ...] is among the two largest of its four neighbours along `in`; of equals the first stay."""
    groups = _fours(weight.abs())
    kept = torch.zeros_like(groups).scatter_(-1, groups.argsort(dim=-1, descending=True, stable=True)[..., :2], 1.0)
    return kept.flatten(-2).movedim(-1, 1)


def keep_zeros(model: nn.Module) -> int:
    """Have training leave the zeros of 2:4 layers as they are; returns how many layers those are.

    A zero stays one when its gradient is zero: weight decay, momentum and averages of zeros are zeros.
    """
    sparse = [layer for _, layer in _layers(model) if _is_sparse(layer.weight)]
    for layer in sparse:
        mask = (layer.weight != 0).to(layer.weight.dtype)
        layer.weight.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))
    return len(sparse)


def _is_sparse(weight: Tensor) -> bool:
    return bool(((_fours(weight.detach()) == 0).sum(-1) >= 2).all())


def _fours(weight: Tensor) -> Tensor:
    """[out, ..., in / 4, 4]."""
    last = weight.movedim(1, -1)
    return last.reshape(*last.shape[:-1], -1, 4)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """By name: those with a multiple of four input channels. Groups of one channel each have nothing to choose from."""
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.shape[1] % 4 == 0:
            yield name, layer
