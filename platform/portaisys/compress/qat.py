"""Training with the rounding of INT8 in every step (Jacob et al. 2018, arXiv:1712.05877), by torchao's PT2E.

The exported graph gets fake quantizers just where quantize.py will put Q and DQ; `fit()` trains it. What is left are float weights
in the model's own names and the ranges that training learnt, by layer: quantize.py writes them, as it writes every other int8 file.
BatchNorm keeps its statistics from the first step on. Knows nothing of files' graphs or of who trains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from portaisys.artifact import write_arrays
from portaisys.compress.quantize import LEARNT, POOL, SUM, kept_by_name, numbered
from portaisys.spec import Quantize, UserError

ANSWERED, ROWS_AT_ONCE = 64, 32

_aten = torch.ops.aten
_WEIGHTED = {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default}
_CONVS = _WEIGHTED - {_aten.linear.default}
_SUMS = {_aten.add.Tensor, _aten.add_.Tensor}
_POOLS = {_aten.adaptive_avg_pool2d.default, _aten.mean.dim}
_RELUS = {_aten.relu.default, _aten.relu_.default}

_ACTIVATION = QuantizationSpec(torch.int8, FakeQuantize.with_args(observer=MovingAverageMinMaxObserver), -127, 127, torch.per_tensor_symmetric)


def around(model: nn.Module, rows: NDArray[Any], options: Quantize, most_tokens: int = 0) -> tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module, Path], nn.Module]]:
    """What `fit` is to prepare `model` with, and what makes the model of what it returns, leaving `LEARNT` in a folder.

    `rows`: of calibration, [n, ...], from which ranges start; `most_tokens` as in `export`. Raises UserError when torch cannot export the model or nothing is quantized.
    """

    def prepare(moved: nn.Module) -> nn.Module:
        return prepared(moved, rows, options, most_tokens)

    def finish(made: nn.Module, folder: Path) -> nn.Module:
        assert isinstance(made, Faked)
        learnt, scales = made.graph.state_dict(), made.scales()
        model.load_state_dict({name: learnt.get(name, tensor) for name, tensor in model.state_dict().items()})
        answers = _answers(converted(made), rows[:ANSWERED])
        write_arrays(folder / LEARNT, {"logits": answers} | {f"scale/{layer}": np.asarray(values, np.float32) for layer, values in scales.items()})
        return model

    return prepare, finish


class Faked(nn.Module):
    """An exported graph with fake quantizers. x -> logits; ranges of activations are learnt in training mode alone, so that validation rows teach nothing."""

    def __init__(self, graph: fx.GraphModule, layers: Mapping[str, str]) -> None:
        super().__init__()
        self.graph, self.layers = graph, dict(layers)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.graph(x)
        return logits

    def train(self, mode: bool = True) -> Faked:
        # Not of the graph: exported ones refuse it, and this one was exported as it is to be trained, without dropout and with frozen statistics.
        self.training = mode
        for fake in self.graph.modules():
            if isinstance(fake, FakeQuantize) and not fake.is_per_channel:
                fake.enable_observer(mode)
        return self

    def scales(self) -> dict[str, list[float]]:
        """Layer -> scales of its activations, in the order that its operator takes them."""
        found = {}
        for node in self.graph.graph.nodes:
            if node.name in self.layers:
                fakes = [self.graph.get_submodule(str(source.target)) for source in node.args if isinstance(source, fx.Node) and source.op == "call_module"]
                found[self.layers[node.name]] = [float(fake.scale) for fake in fakes if isinstance(fake, FakeQuantize) and not fake.is_per_channel]
        return found


def prepared(model: nn.Module, rows: NDArray[Any], options: Quantize, most_tokens: int = 0) -> Faked:
    """`model`, on its device, as a graph of the same tensor names with fake quantizers whose ranges start from `rows`."""
    device = next(model.parameters()).device
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)} | ({1: torch.export.Dim("tokens", min=1, max=most_tokens)} if most_tokens else {})
    try:
        program = torch.export.export(model.eval(), (torch.from_numpy(rows[:2]).to(device),), dynamic_shapes=(free,))
    except Exception as error:
        raise UserError(f"compress.quantize.method: qat trains what torch.export makes of a model, and it cannot export this one: {str(error).strip().splitlines()[0]}; take method: ptq") from error
    placement = Placement(options)
    faked = Faked(prepare_qat_pt2e(program.module(check_guards=False), placement), placement.layers)
    _answers(faked.train(), rows)
    return faked


def converted(faked: Faked) -> nn.Module:
    """The integer model as torch has it: Q and DQ in place of the fake quantizers. `faked` is used up."""
    made: nn.Module = convert_pt2e(faked.eval().graph)
    return made


def _answers(model: nn.Module, rows: NDArray[Any]) -> NDArray[Any]:
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), "cpu")
    with torch.no_grad():
        parts = [model(torch.from_numpy(rows[start : start + ROWS_AT_ONCE]).to(device)).float().cpu().numpy() for start in range(0, len(rows), ROWS_AT_ONCE)]
    return np.concatenate(parts)


# --- where -----------------------------------------------------------------------------------------------------------


class Placement(Quantizer):  # type: ignore[misc]  # torchao has no types
    """The placement of `quantize.make_plan`, in the words of torch's operators. `layers`: annotated node -> its layer's name, as `quantize.layers_of` gives it.

    Our own, since torchao's for x86 quantizes what it finds between a convolution and its ReLU otherwise, and the head.
    """

    def __init__(self, options: Quantize) -> None:
        super().__init__()
        self.options, self.layers = options, dict[str, str]()
        most = 64 if options.reduce_range else 127
        # The average of one: a weight's range is what it is now. A factor a channel, as of BatchNorm, changes scales and no integer, so unfolded is as good.
        observer = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0)
        self._weight = QuantizationSpec(torch.int8, observer, -most, most, torch.per_channel_symmetric, ch_axis=0)

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """BatchNorm becomes a function of ours, which torchao does not take for one in training."""
        for node in model.graph.nodes:
            if node.target is _aten.batch_norm.default:
                node.target = frozen_norm
        model.recompile()
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Mark inputs of the chosen nodes."""
        weighted = [node for node in model.graph.nodes if node.target in _WEIGHTED and _is_constant(node.args[1])]
        sizes = {node: _tensor(model, node.args[1]).numel() for node in weighted}
        wants = 2 * sum(sizes[node] for node in weighted if node.target in _CONVS) > sum(sizes.values()) if self.options.quantize_add is None else self.options.quantize_add
        sums = [node for node in model.graph.nodes if node.target in _SUMS and all(isinstance(source, fx.Node) and not _is_constant(source) for source in node.args[:2])]
        pools = [node for node in model.graph.nodes if node.target in _POOLS]
        names = dict(_named([*weighted, *sums, *pools], model))
        chosen = [*weighted[:-1], *(sums if wants else []), *(node for node in pools if wants and sums and node.args[0].target in _RELUS)]
        kept = kept_by_name(self.options.keep, [names[node] for node in [*chosen, *weighted[-1:]]])
        chosen = [node for node in chosen if names[node] not in kept]
        if not weighted[:-1] or not chosen:
            raise UserError("compress.quantize: nothing to quantize beside the head: no convolution or Linear is left; remove this step")
        for node in chosen:
            self._mark(node, is_weighted=node in sizes)
            self.layers[node.name] = names[node]
        return model

    def _mark(self, node: fx.Node, *, is_weighted: bool) -> None:
        sources = [source for source in node.args[: 1 if is_weighted or node.target in _POOLS else 2] if isinstance(source, fx.Node)]
        inputs: dict[fx.Node, Any] = dict.fromkeys(sources, _ACTIVATION)
        if is_weighted:
            inputs[node.args[1]] = self._weight  # type: ignore[index]
        node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing: the placement is valid by the way it is made."""


def frozen_norm(x: Tensor, weight: Any, bias: Any, mean: Tensor, variance: Tensor, training: bool, momentum: float, eps: float, fused: bool) -> Tensor:
    """aten.batch_norm with the statistics it has."""
    return F.batch_norm(x, mean, variance, weight, bias, False, momentum, eps)


def _is_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _tensor(model: fx.GraphModule, node: Any) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), name)
    return found


def _named(nodes: Sequence[fx.Node], model: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """Nodes with their layers' names, counted in the order of the graph."""
    order = {node: index for index, node in enumerate(model.graph.nodes)}
    seen: Counter[str] = Counter()
    for node in sorted(nodes, key=order.__getitem__):
        stack = [*node.meta.get("nn_module_stack", {}).values()]
        name = (stack[-1][0] if stack else "") + (SUM if node.target in _SUMS else POOL if node.target in _POOLS else "")
        seen[name] += 1
        yield node, numbered(name, seen[name])
