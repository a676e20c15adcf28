"""Models: one table, one file an architecture. Every model takes raw rows, numbers or token ids; normalisation of numbers is its first layer.

`build` makes one from a spec section, `rebuild` makes a pruned one from the names and shapes of its weights (no pickle),
`count` gives parameters and multiply-accumulates. Knows nothing of data sets or training.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from portaisys import artifact, spec
from portaisys.data.sources import call_factory, import_factory
from portaisys.models.convnet import convnet
from portaisys.models.transformer import text_transformer, transformer
from portaisys.spec import UserError


def _factory(options: spec.ModelFactory, shape: tuple[int, ...], classes: int) -> nn.Module:
    made = call_factory(options.factory, options.options, "model.factory")
    if not isinstance(made, nn.Module):
        raise UserError(f"model.factory: {options.factory} gave a {type(made).__name__}, not a torch.nn.Module")
    return made


MODELS: dict[type[Any], Callable[..., nn.Module]] = {
    spec.ConvNet: convnet,
    spec.Transformer: transformer,
    spec.ModelFactory: _factory,
}
TEXT_MODELS: dict[type[Any], Callable[..., nn.Module]] = {
    spec.TextTransformer: text_transformer,
    spec.ModelFactory: lambda options, shape, classes, vocabulary: _factory(options, shape, classes),
}


class Classifier(nn.Module):
    """Raw rows [B, *shape] -> logits [B, classes]: normalise, then `net`. So no caller can forget the normalisation."""

    mean: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)
        self.register_buffer("scale", 1 / std)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x - self.mean) * self.scale)
        return logits


class TextClassifier(nn.Module):
    """Token ids [B, T], int64 -> logits [B, classes]: `net`, as there is nothing to normalise. T may be any up to the cap of the data."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def build(options: Any, shape: Sequence[int], classes: int, mean: Any = (0.0,), std: Any = (1.0,), vocabulary: int = 0) -> Classifier | TextClassifier:
    """A fresh model for rows of `shape`. `mean`, `std`: one value, or one a channel. `vocabulary`: of rows that are token ids, else 0.

    Raises UserError when the factory fails, the model takes another kind of rows, or the outputs do not match the classes.
    """
    table = TEXT_MODELS if vocabulary else MODELS
    if type(options) not in table:
        raise UserError(f"model.name: {options.name} takes {'numbers and the rows are token ids' if vocabulary else 'token ids and the rows are numbers'}; take {_names(table)}")
    if vocabulary:
        model: Classifier | TextClassifier = TextClassifier(table[type(options)](options, tuple(shape), classes, vocabulary))
    else:
        spread = (-1,) + (1,) * (len(shape) - 1)
        net = table[type(options)](options, tuple(shape), classes)
        model = Classifier(net, torch.as_tensor(mean).reshape(spread), torch.as_tensor(std).reshape(spread))
    check_outputs(model, shape, classes)
    return model


def _names(table: Mapping[type[Any], Any]) -> str:
    return " or ".join(str(typing.get_args(options.model_fields["name"].annotation)[0]) for options in table)


def example(model: nn.Module, shape: Sequence[int], rows: int) -> Tensor:
    """Rows of zeros of the type that `model` takes: float32 [rows, *shape], or int64 ids of the longest row there may be."""
    return torch.zeros(rows, *shape, dtype=torch.int64 if isinstance(model, TextClassifier) else torch.float32)


def check_outputs(model: nn.Module, shape: Sequence[int], classes: int) -> None:
    """Raise UserError unless the model turns rows of `shape` into logits of `classes`."""
    try:
        with torch.no_grad():
            logits = copy.deepcopy(model).eval()(example(model, shape, 2))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"model: it does not take rows of shape {tuple(shape)}: {error}") from None
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"model: for 2 rows it gives {given}, the data has {classes} classes; its output must be logits of shape (2, {classes})")


def source_digest(options: Any) -> dict[str, str]:
    """What of a model no spec holds: the code of a user's factory, as {"source": SHA-256 of its module's file}."""
    if not isinstance(options, spec.ModelFactory):
        return {}
    file = getattr(import_factory(options.factory, "model.factory")[0], "__file__", None)
    return {"source": artifact.hash_file(Path(file))} if file else {}


def count(model: nn.Module, shape: Sequence[int]) -> dict[str, int]:
    """`parameters` and `macs` (multiply-accumulates of one row, of the longest text: half of torch's FLOP count)."""
    return count_inputs(model, (example(model, shape, 1),))


def count_inputs(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, int]:
    """The same of a model of any inputs: `inputs` are one row of each."""
    counter = FlopCounterMode(display=False)
    # The counter knows no fused CPU attention kernel and would count it as nothing; the plain one it does know.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        copy.deepcopy(model).eval()(*inputs)
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2}


def predictor(model: nn.Module) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """The model as a plain function of arrays, in evaluation mode: rows [B, *shape] -> logits [B, classes], float32."""
    frozen = model.eval()
    device = next(model.parameters()).device

    def predict(x: NDArray[Any]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = frozen(torch.from_numpy(x).to(device)).float().cpu().numpy()
            return logits

    return predict


def save(model: nn.Module, path: Path) -> None:
    """Weights as safetensors, whole or not at all."""
    artifact.write_bytes(path, safetensors.torch.save({name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Weights saved by `save`. Raises UserError when the file is damaged."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
        return tensors
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: no readable safetensors file ({error}); delete its folder and run the stage again") from None


class Skip(nn.Module):
    """Where a block has left: gives its first input on. Its tensor without elements is how `rebuild` knows of it from the weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(SKIPPED, torch.zeros(0))

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return x


SKIPPED = "skipped"

# What follows the shape of a layer's weight, by layer type: attribute -> dimension of the weight.
_ATTRIBUTES: dict[type[nn.Module], dict[str, int]] = {
    nn.Linear: {"out_features": 0, "in_features": 1},
    nn.Embedding: {"num_embeddings": 0, "embedding_dim": 1},
    nn.BatchNorm1d: {"num_features": 0},
    nn.BatchNorm2d: {"num_features": 0},
    nn.GroupNorm: {"num_channels": 0},
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def can_follow(module: nn.Module) -> bool:
    """Whether `rebuild` can give this layer another width: it is to be read off its weight."""
    return isinstance(module, (*CONVOLUTIONS, nn.LayerNorm, *_ATTRIBUTES)) and module.weight is not None


def rebuild(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give `model` the weights `tensors` (a state dict), changing layer widths in place where shapes differ and leaving out the blocks that have left.

    Raises UserError when the names differ: the tensors belong to another model.
    """
    _leave_out(model, tensors)
    state = model.state_dict()
    if state.keys() != tensors.keys():
        odd = sorted(state.keys() ^ tensors.keys())
        raise UserError(f"model: the checkpoint is of another model; {len(odd)} tensor names differ, first {odd[0]!r}")
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf in owner._parameters and owner._parameters[leaf] is not None:
            owner._parameters[leaf] = nn.Parameter(tensor.detach().clone())
        else:
            owner._buffers[leaf] = tensor.detach().clone()
    for module in model.modules():
        _follow_weight(module)


def _leave_out(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        block, _, leaf = name.rpartition(".")
        if leaf == SKIPPED and not tensor.numel() and block in modules:
            model.set_submodule(block, Skip())


def _follow_weight(module: nn.Module) -> None:
    if isinstance(module, CONVOLUTIONS):
        # A grouped convolution's weight is [out, in / groups]; only a depthwise one changes its groups when pruned.
        depthwise = module.groups == module.in_channels == module.out_channels
        module.out_channels = module.weight.shape[0]
        module.groups = module.out_channels if depthwise and module.groups > 1 else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    for attribute, dim in next((follows for kind, follows in _ATTRIBUTES.items() if isinstance(module, kind)), {}).items():
        if isinstance(module.weight, Tensor):
            setattr(module, attribute, module.weight.shape[dim])
