"""INT8 and FP8 post-training quantization of an exported file, ONNX to ONNX.

One file for all engines: signed, symmetric, Q/DQ, weights per channel, no quantized bias, which is what TensorRT takes;
ONNX Runtime's build step turns the activations unsigned for x86. Knows the graph and the calibration rows; whether the
result is accurate enough or faster is for the gate to measure.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from portaisys.artifact import write_bytes
from portaisys.engine import Arrays
from portaisys.engine.onnx_file import face_of, read_onnx
from portaisys.spec import Quantize, UserError

WEIGHTED = ("Conv", "MatMul", "Gemm")
POOLS = ("GlobalAveragePool", "ReduceMean")
MAX_BATCH = 32  # calibration rows at a time, at most
METHODS = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}


@dataclass(frozen=True)
class Plan:
    """Names of the nodes whose inputs are quantized, and of the weighted ones left in fp32."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    adds: int


def quantize(onnx_in: Path, onnx_out: Path, calibration: NDArray[Any] | Arrays, options: Quantize, precision: str = "int8") -> dict[str, Any]:
    """Write `onnx_out`, the int8 or fp8 version of `onnx_in`; the same input gives the same bytes. Returns figures and `notes`.

    `calibration`: [rows, ...] of the graph's one input, or of every input by name. Raises UserError when it is empty, constant,
    not finite or of the wrong shape (scales are never made up), and when the graph has nothing to quantize.
    """
    model = read_onnx(onnx_in)
    feeds, batch = _feeds(model, calibration)
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, raw = (Path(folder) / name for name in ("plain.onnx", "ready.onnx", "int8.onnx"))
        plain.write_bytes(_of_opset(model, 13 if precision == "int8" else 19).SerializeToString())  # a model given as such would be split into files
        # Folds BatchNorm and constants, infers shapes. The symbolic inference needs sympy and changed nothing here.
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        model = _named(ready)
        # TensorRT's 8-bit floats are for products; sums stay what they are around them.
        plan = make_plan(model.graph, options.quantize_add if precision == "int8" else False)
        if not plan.quantized:
            raise UserError("compress.quantize: nothing to quantize beside the head: no Conv, MatMul or Gemm with constant weights; remove this step")
        _quantize(model, raw, _Rows(feeds, batch), plan, options, precision)
        made = onnx.load(raw) if precision == "int8" else _to_fp8(onnx.load(raw))
        write_bytes(onnx_out, made.SerializeToString(deterministic=True))
    return _figures(onnx_in, onnx_out, len(next(iter(feeds.values()))), plan, precision)


def _feeds(model: Any, calibration: NDArray[Any] | Arrays) -> tuple[dict[str, NDArray[Any]], int]:
    """Rows by input, when they are fit for the graph, and the batch the graph fixes (0: free)."""
    face = face_of(model)
    if not isinstance(calibration, Mapping):
        if len(face.inputs) != 1:
            raise UserError(f"compress.quantize: calibration rows feed one input, this graph has {len(face.inputs)}; give rows for each by name")
        calibration = {face.inputs[0].name: calibration}
    if face.batch is None:
        raise UserError("compress.quantize: the inputs share no batch in dimension 0, so there are no rows to calibrate with; export the model with one")
    if set(calibration) != {tensor.name for tensor in face.inputs} or len({len(rows) for rows in calibration.values()}) != 1:
        raise UserError(f"compress.quantize: needs equally many rows for {', '.join(tensor.name for tensor in face.inputs)}; got {', '.join(f'{name} {len(rows)}' for name, rows in calibration.items())}")
    for tensor in face.inputs:
        _check_rows(calibration[tensor.name], tensor.dtype, [-1, *tensor.shape[1:]])
    if all(rows.min() == rows.max() for rows in calibration.values()):
        raise UserError("compress.quantize: every calibration value is the same, so no range can be learnt; give real rows")
    return dict(calibration), face.batch


def _check_rows(rows: NDArray[Any], dtype: str, shape: list[int]) -> None:
    if not len(rows):
        raise UserError("compress.quantize: no calibration rows; set data.calibration_rows to 100 or more")
    fits = len(shape) == rows.ndim and all(want in (-1, got) for want, got in zip(shape, rows.shape, strict=True))
    if rows.dtype.name != dtype or not fits:
        raise UserError(f"compress.quantize: the graph takes {dtype} {shape}, the calibration rows are {rows.dtype} {list(rows.shape)}")
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        raise UserError("compress.quantize: calibration rows hold NaN or infinity, which no scale can cover; clean the data")


def _of_opset(model: Any, least: int) -> Any:
    """The model, brought to the first opset that has a scale per channel (13) or 8-bit floats (19) where it is older."""
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return model if opset >= least else onnx.version_converter.convert_version(model, least)


def _named(path: Path) -> Any:
    """The model with a name on every node, since the plan speaks of nodes by name."""
    model = onnx.load(path)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


# --- what is quantized ----------------------------------------------------------------------------------------------


def make_plan(graph: Any, quantize_add: bool | None) -> Plan:
    """Choose the nodes. All weighted ones but the head; in a CNN also residual sums and the pool behind a ReLU.

    The head stays in fp32: ORT has no integer kernel that gives floats there, so it would only dequantize weights again
    (measured: error 1.25 -> 0.77 %, 4 % faster). Without the sums and the pool, every block would go through fp32 and back
    (measured: 0.55 x the speed of fp32 instead of 1.9 x). In transformers quantizing the sums costs accuracy.
    The first Conv is quantized although fp32 would be 8 % faster there: sums of floats differ between CPUs in the last bit,
    and one bit in the stem moved the logits by 0.8 %; then a version would not give its golden answers elsewhere.
    """
    sizes = {tensor.name: prod(tensor.dims) for tensor in graph.initializer}
    weighted = [node for node in graph.node if node.op_type in WEIGHTED and node.input[1] in sizes]
    sums = _residual_sums(graph.node, sizes) if _wants_sums(weighted, sizes, quantize_add) else []
    pools = _pools_behind_relu(graph.node) if sums else []
    body = weighted[:-1]
    chosen = [*body, *sums, *pools] if body else []
    return Plan(tuple(node.name for node in chosen), tuple(node.name for node in weighted[-1:]), len(sums))


def _wants_sums(weighted: list[Any], sizes: dict[str, int], quantize_add: bool | None) -> bool:
    """As asked; else whether this is a CNN: most of its weights are convolutions' (a patch embedding alone is not)."""
    if quantize_add is not None:
        return quantize_add
    convs = sum(sizes[node.input[1]] for node in weighted if node.op_type == "Conv")
    return 2 * convs > sum(sizes[node.input[1]] for node in weighted)


def _residual_sums(nodes: Iterable[Any], sizes: dict[str, int]) -> list[Any]:
    return [node for node in nodes if node.op_type == "Add" and not any(name in sizes for name in node.input)]


def _pools_behind_relu(nodes: Iterable[Any]) -> list[Any]:
    relus = {node.output[0] for node in nodes if node.op_type == "Relu"}
    return [node for node in nodes if node.op_type in POOLS and node.input[0] in relus]


# --- the library's part -----------------------------------------------------------------------------------------------


class _Rows:
    """Calibration rows as ORT reads them: one dict of arrays after the other, then None."""

    def __init__(self, feeds: Arrays, fixed: int) -> None:
        rows = len(next(iter(feeds.values())))
        # ORT's "entropy" and "percentile" stack the batches into one array, so none may be shorter.
        batch = fixed or next(size for size in range(MAX_BATCH, 0, -1) if rows % size == 0)
        parts = [slice(start, start + batch) for start in range(0, rows - batch + 1, batch)]
        self._feeds: Iterator[dict[str, Any]] = ({name: array[part] for name, array in feeds.items()} for part in parts)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _quantize(model: Any, out: Path, rows: _Rows, plan: Plan, options: Quantize, precision: str) -> None:
    types = sorted({node.op_type for node in model.graph.node if node.name in plan.quantized})
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        quantize_static(
            model, out, rows, quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=options.reduce_range and precision == "int8",
            weight_type=QuantType.QInt8, activation_type=QuantType.QInt8, calibrate_method=METHODS[options.calibration],
            op_types_to_quantize=types, nodes_to_quantize=list(plan.quantized),
            extra_options={
                # No quantized bias (TensorRT refuses int32 DQ), nothing between a Conv and its ReLU (it would part them).
                "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "OpTypesToExcludeOutputQuantization": types,
                "AddQDQPairToWeight": precision == "fp8",  # leaves the fp32 weights, to be rounded once
            },
        )  # fmt: skip


FP8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
MOST_FP8 = 448.0


def _to_fp8(model: Any) -> Any:
    """A Q/DQ file of int8 with fp32 weights, with 8-bit floats (E4M3; Micikevicius et al. 2022, arXiv:2209.05433) over the same ranges."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    done: set[str] = set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not {*node.input[1:3]} <= done:
            _scaled(tensors[node.input[1]], tensors[node.input[2]])
            done |= {*node.input[1:3]}
    weights = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in tensors]
    for node in weights:  # rounded here, once, so that the file holds 8 bits each
        tensors[node.output[0]] = _rounded(node, tensors)
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(tensor for name, tensor in tensors.items() if name in read)
    return model


def _scaled(scale: Any, zero: Any) -> None:
    """The same range in 448 steps up and down instead of 127, and a zero point of the other type."""
    values = numpy_helper.to_array(scale)
    scale.CopyFrom(numpy_helper.from_array((values * (127 / MOST_FP8)).astype(values.dtype), scale.name))
    zero.CopyFrom(numpy_helper.from_array(np.zeros(zero.dims, FP8), zero.name))


def _rounded(node: Any, tensors: Mapping[str, Any]) -> Any:
    weight, scale = (numpy_helper.to_array(tensors[name]) for name in node.input[:2])
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [-1 if index == axis % weight.ndim else 1 for index in range(weight.ndim)] if scale.size > 1 else []
    return numpy_helper.from_array(np.clip(weight / scale.reshape(shape), -MOST_FP8, MOST_FP8).astype(FP8), node.output[0])


def _figures(onnx_in: Path, onnx_out: Path, rows: int, plan: Plan, precision: str) -> dict[str, Any]:
    return {
        "quantized_nodes": len(plan.quantized), "quantized_adds": plan.adds, "calibration_rows": rows,
        "onnx_bytes_fp32": onnx_in.stat().st_size, f"onnx_bytes_{precision}": onnx_out.stat().st_size,
        "notes": [f"kept in fp32: {', '.join(plan.kept)} (the head)"],
    }  # fmt: skip
