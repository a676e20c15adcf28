"""Small ONNX files for the tests, made by hand: no torch, no exporter, seconds saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 12


class Graph:
    """Nodes and weights as they are added; every tensor is named after its node."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, *shape: int, fan_in: int = 0) -> str:
        name = f"w{len(self.weights)}"
        values = self.rng.standard_normal(shape) * (np.sqrt(2 / fan_in) if fan_in else 0.1)
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def conv(self, x: str, channels: int, width: int, stride: int = 1, size: int = 3) -> str:
        weights = self.weight(width, channels, size, size, fan_in=channels * size * size)
        return self.op("Conv", x, weights, self.weight(width), pads=[size // 2] * 4, strides=[stride] * 2)

    def save(self, path: Path, output: str, shape: list[Any]) -> Path:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, [shape[0], 10])
        graph = helper.make_graph(self.nodes, "graph", [x], [y], self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        return path


def cnn(path: Path, *, seed: int = 0, width: int = 16, batch: Any = "batch") -> Path:
    """Stem, a plain residual block, one with a projection, pool, head: x [batch, 1, 12, 12] -> logits [batch, 10]."""
    graph = Graph(seed)
    x = graph.op("Relu", graph.conv("x", 1, width))
    for channels, stride in ((width, 1), (2 * width, 2)):
        inner = graph.op("Relu", graph.conv(x, width, channels, stride))
        short = x if stride == 1 else graph.conv(x, width, channels, stride, size=1)
        x = graph.op("Relu", graph.op("Add", graph.conv(inner, channels, channels), short))
    x = graph.op("Flatten", graph.op("GlobalAveragePool", x))
    return graph.save(path, graph.op("Gemm", x, graph.weight(2 * width, 10), graph.weight(10)), [batch, 1, SIDE, SIDE])


def rows(count: int, seed: int = 1) -> np.ndarray:
    """Smooth pictures with some noise, float32 [count, 1, 12, 12]."""
    rng = np.random.default_rng(seed)
    smooth = rng.standard_normal((count, 1, SIDE // 4, SIDE // 4)).repeat(4, 2).repeat(4, 3)
    return (smooth + 0.3 * rng.standard_normal((count, 1, SIDE, SIDE))).astype(np.float32)
