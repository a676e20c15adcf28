"""INT8 and FP8 post-training quantization of an exported file, ONNX to ONNX.

One file for all engines: signed, symmetric, Q/DQ, weights per channel, no quantized bias, which is what TensorRT takes;
ONNX Runtime's build step turns the activations unsigned for x86. Knows the graph and the calibration rows; whether the
result is accurate enough or faster is for the gate to measure.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.shape_inference import quant_pre_process

from portaisys.artifact import write_bytes
from portaisys.compress.sensitivity import Bench, error, measured, report, search
from portaisys.engine import Arrays
from portaisys.engine.onnx_file import LAYER, face_of, read_onnx
from portaisys.spec import Gate, Quantize, UserError

WEIGHTED = ("Conv", "MatMul", "Gemm")
POOLS = ("GlobalAveragePool", "ReduceMean")
SUM, POOL = ":sum", ":pool"
MAX_BATCH = 32  # calibration rows at a time, at most
LEAST_ROWS = 16  # fewer show no range worth the name; hundreds are better
_GATE = Gate()
# What qat leaves. scale/<layer>: of its activations, in order; logits: what the converted torch model answers to the first calibration rows.
LEARNT = "qat.npz"
# What the library looks for; of "entropy" we look ourselves, and tell it the ranges.
METHODS = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}


@dataclass(frozen=True)
class Plan:
    """Names of the nodes whose inputs are quantized, and of the weighted ones left in fp32."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    adds: int


@dataclass(frozen=True)
class HeldOut:
    """Rows that nothing is calibrated on, to measure with: of validation, never of the test split. `y`: their labels [rows]."""

    rows: NDArray[Any] | Arrays
    y: NDArray[Any] | None = None


def quantize(
    onnx_in: Path, onnx_out: Path, calibration: NDArray[Any] | Arrays, options: Quantize, precision: str = "int8", *,
    held_out: HeldOut | None = None, scales: Mapping[str, Sequence[float]] | None = None, asked: Gate = _GATE,
) -> dict[str, Any]:  # fmt: skip
    """Write `onnx_out`, the int8 or fp8 version of `onnx_in`; the same input gives the same bytes. Returns figures and `notes`.

    `calibration`: [rows, ...] of the graph's one input, or of every input by name. `held_out`: what `calibration: auto`, `sensitivity` and `mixed` measure with,
    by default every second calibration row, which then calibrates nothing. `scales`: of a layer's activations as training learnt them, in place of calibrated ones;
    `asked`: the gate whose margin `mixed` has to meet. Raises UserError when the rows are empty, constant, not finite or of the wrong shape (scales are never
    made up), when the graph has nothing to quantize, and when `options.keep` names no layer.
    """
    model = read_onnx(onnx_in)
    feeds, batch = _feeds(model, calibration)
    if held_out is None and (options.calibration == "auto" or options.sensitivity or options.searches):
        held_out, feeds = HeldOut({name: rows[1::2] for name, rows in feeds.items()}), {name: rows[::2] for name, rows in feeds.items()}
    with tempfile.TemporaryDirectory() as folder:
        plain, ready = (Path(folder) / name for name in ("plain.onnx", "ready.onnx"))
        plain.write_bytes(_of_opset(model, 13 if precision == "int8" else 19).SerializeToString())  # a model given as such would be split into files
        # Folds BatchNorm and constants, infers shapes. The symbolic inference needs sympy and changed nothing here.
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        graph = _named(ready).graph
        # TensorRT's 8-bit floats are for products; sums stay what they are around them.
        plan = make_plan(graph, options.quantize_add if precision == "int8" else False)
        if not plan.quantized:
            raise UserError("compress.quantize: nothing to quantize beside the head: no Conv, MatMul or Gemm with constant weights; remove this step")
        layers = layers_of(model, plan)
        by_hand = kept_by_name(options.keep, [*layers.values()])
        chosen = [name for name in plan.quantized if layers[name] not in by_hand]
        if not chosen:
            raise UserError("compress.quantize.keep: nothing is left to quantize; keep fewer layers, or remove this step")
        scores: dict[str, Any] = {}
        notes = [f"kept in fp32: {', '.join(layers[name] for name in plan.kept)} (the head)"] if options.method != "weight_only" else []
        notes += [f"kept in fp32 as asked: {', '.join(sorted(by_hand))}"] if by_hand else []
        if options.method == "weight_only":
            made, chosen = _weights_only(_named(ready), [name for name in (*plan.quantized, *plan.kept) if layers[name] not in by_hand])
            notes.append("weights alone are int8: the file is small, and ONNX Runtime's CPU computes with floats made of them, so its engine is no faster")
        else:
            work = _Work(ready, feeds, batch, plan, chosen, layers, options, precision, Path(folder), held_out, scales or {}, asked)
            made, chosen = _calibrated(work, scores, notes)
        write_bytes(onnx_out, made.SerializeToString(deterministic=True))
    adds = sum(node.op_type == "Add" and node.name in chosen for node in graph.node)
    return scores | _figures(onnx_in, onnx_out, len(next(iter(feeds.values()))), len(chosen), adds, precision, notes)


@dataclass(frozen=True)
class _Work:
    """What a file is made of, with `chosen` of the plan's nodes quantized; `layers`: by node, in the user's words."""

    ready: Path
    feeds: dict[str, NDArray[Any]]
    batch: int
    plan: Plan
    chosen: Sequence[str]
    layers: Mapping[str, str]
    options: Quantize
    precision: str
    folder: Path
    held_out: HeldOut | None
    scales: Mapping[str, Sequence[float]]
    asked: Gate


def _calibrated(work: _Work, scores: dict[str, Any], notes: list[str]) -> tuple[Any, list[str]]:
    """The file with calibrated or learnt ranges, and the nodes that are quantized in it."""
    bench = _bench(work) if work.held_out else None
    plain, chosen = _named(work.ready), [*work.chosen]
    full = _best(work, plain, bench, scores, notes) if work.options.calibration == "auto" and bench else _with(work, work.options.calibration, work.precision)
    if work.scales:
        notes += _put_scales(full, work)
    if bench and (work.options.sensitivity or work.options.searches):
        if work.precision == "int8":
            chosen = _searched(work, full, plain, bench, scores, notes)
        else:
            notes.append("sensitivity and mixed are measured with ONNX Runtime's int8 engines, so not for fp8: all layers are quantized but those kept by name")
    made = _part(work, full, plain, chosen)
    return (made if work.precision == "int8" else _to_fp8(made)), chosen


def _with(work: _Work, method: str, precision: str) -> Any:
    """All of the plan quantized, ranges by one method. For fp8 still int8, with fp32 weights."""
    raw = work.folder / f"{method}.onnx"
    _quantize(_named(work.ready), raw, _Rows(work.feeds, work.batch), work.plan, work.options, precision, method)
    return onnx.load(raw)


def _best(work: _Work, plain: Any, bench: Bench, scores: dict[str, Any], notes: list[str]) -> Any:
    """The file of the method whose answers err least; what each gave goes into scores and notes."""
    right = measured(plain, "fp32", bench)
    made = {method: _with(work, method, "int8") for method in METHODS}
    answers = {method: measured(_part(work, model, plain, work.chosen), "int8", bench) for method, model in made.items()}
    table = {method: {"error": error(right, found), "agreement": float((found.argmax(1) == right.argmax(1)).mean())} for method, found in answers.items()}
    best = min(table, key=lambda method: (table[method]["error"], -table[method]["agreement"]))  # the first of equals
    scores.update(calibration=best, calibrations=table)
    each = ", ".join(f"{method} {line['error']:.3g} ({100 * line['agreement']:.4g} % the same answers)" for method, line in table.items())
    notes.append(f"calibration: {best}, whose int8 answers to {len(right):,} rows that were not calibrated on err least; error of the logits: {each}")
    return made[best] if work.precision == "int8" else _with(work, best, work.precision)  # ONNX Runtime's CPU has no fp8 to measure


def _bench(work: _Work) -> Bench:
    held_out = work.held_out
    assert held_out
    feeds = held_out.rows if isinstance(held_out.rows, Mapping) else {name: held_out.rows for name in work.feeds}
    most = work.options.rows
    return Bench({name: rows[:most] for name, rows in feeds.items()}, None if held_out.y is None else held_out.y[:most], work.batch, work.folder)


def _searched(work: _Work, full: Any, plain: Any, bench: Bench, scores: dict[str, Any], notes: list[str]) -> list[str]:
    """The nodes that stay quantized; with the report of the layers among the scores."""
    nodes: dict[str, list[str]] = {}
    for name in work.chosen:
        nodes.setdefault(work.layers[name], []).append(name)
    make = partial(_part, work, full, plain)
    lines = report(nodes, make, plain, bench)
    scores["sensitivity"] = lines
    if not work.options.searches:
        return [*work.chosen]
    limit = work.asked.max_accuracy_drop / 2 if work.options.max_drop is None else work.options.max_drop
    back, told = search([line["layer"] for line in lines], nodes, make, plain, bench, limit, work.asked)
    scores["returned"] = list(back)
    notes += told
    return [name for name in work.chosen if work.layers[name] not in back]


def _part(work: _Work, full: Any, plain: Any, chosen: Collection[str]) -> Any:
    return full if len(chosen) == len(work.plan.quantized) else only(full, plain, chosen)


def only(full: Any, plain: Any, chosen: Collection[str]) -> Any:
    """The quantized file `full` with Q and DQ on the inputs of the nodes `chosen` alone; all others read what they do in `plain`, of which it was made."""
    made = onnx.ModelProto()
    made.CopyFrom(full)
    graph = made.graph
    before = {node.name: node for node in plain.graph.node}
    for node in graph.node:
        if node.name in before and node.name not in chosen:
            node.input[:] = before[node.name].input
    _drop_unread(graph)
    there = {tensor.name for tensor in graph.initializer}
    read = {name for node in graph.node for name in node.input}
    _replace(graph.initializer, [*(tensor for tensor in graph.initializer if tensor.name in read), *(tensor for tensor in plain.graph.initializer if tensor.name in read - there)])
    return made


def _drop_unread(graph: Any) -> None:
    """Remove Q and DQ nodes whose output nobody reads."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        kept = [node for node in graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.output[0] in read]
        if len(kept) == len(graph.node):
            return
        _replace(graph.node, kept)


def _replace(field: Any, values: list[Any]) -> None:
    copies = [type(value)() for value in values]
    for copied, value in zip(copies, values, strict=True):
        copied.CopyFrom(value)
    del field[:]
    field.extend(copies)


def _put_scales(model: Any, work: _Work) -> list[str]:
    """Write learnt scales over the calibrated ones of the activations, in place. Returns a note on layers that have none."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    rounds = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] not in tensors}
    made_by = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in rounds}
    without = []
    for node in model.graph.node:
        if node.name not in work.chosen:
            continue
        activations = [made_by[name] for name in node.input if name in made_by]
        learnt = work.scales.get(work.layers[node.name], ())
        if len(learnt) != len(activations):
            without.append(work.layers[node.name])
            continue
        for dequantize, value in zip(activations, learnt, strict=True):
            scale = tensors[dequantize.input[1]]
            scale.CopyFrom(numpy_helper.from_array(np.full(scale.dims, value, np.float32), scale.name))
    return [f"ranges as calibrated, since training learnt none for them: {', '.join(without)}"] if without else []


def _weights_only(model: Any, names: Sequence[str]) -> tuple[Any, list[str]]:
    """int8 weights with a DequantizeLinear per output channel, everything else as it was; and the nodes that have them."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, str] = {}
    weighted = [node for node in graph.node if node.name in names and node.op_type in WEIGHTED]
    steps, rounded = [], []
    for node in weighted:
        weight = node.input[1]
        if weight not in made:
            made[weight] = f"{weight}_DequantizeLinear_Output"
            axis = _output_axis(node, tensors[weight])
            rounded += _rounded_int8(tensors[weight], axis)
            steps.append(helper.make_node("DequantizeLinear", [tensor.name for tensor in rounded[-3:]], [made[weight]], name=f"{weight}_DequantizeLinear", axis=axis))
        node.input[1] = made[weight]
    _replace(graph.node, [*steps, *graph.node])
    read = {name for node in graph.node for name in node.input}
    _replace(graph.initializer, [*(tensor for tensor in graph.initializer if tensor.name in read), *rounded])
    return model, [node.name for node in weighted]


def _output_axis(node: Any, weight: Any) -> int:
    """Of a weight: 0 for Conv and a transposed Gemm, the last for MatMul and a plain Gemm."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else len(weight.dims) - 1


def _rounded_int8(tensor: Any, axis: int) -> list[Any]:
    """Values, scales and zero points of a weight, its whole range in 127 steps up and down a channel: no integer products are made of them."""
    weight = numpy_helper.to_array(tensor)
    others = tuple(index for index in range(weight.ndim) if index != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    named = {"quantized": np.round(weight / scale).astype(np.int8), "scale": scale.reshape(-1), "zero_point": np.zeros(scale.size, np.int8)}
    return [numpy_helper.from_array(values, f"{tensor.name}_{what}") for what, values in named.items()]


def refuse_calibration(rows: int, options: Quantize) -> None:
    """Raise UserError, before any work is spent, when the calibration rows are too few. (That they are of one class, splitting has refused.)"""
    if rows < LEAST_ROWS and options.method != "weight_only":
        raise UserError(f"data.calibration_rows: {rows} rows are too few to learn the ranges of activations from; give at least {LEAST_ROWS}, better hundreds")


def refuse_no_module(keep: Sequence[str], modules: Sequence[str]) -> None:
    """Raise UserError, before there is a file whose layers could be asked, for a name that no module of the model has. (The exporter's own are `node_...`.)"""
    for asked in keep:
        if not asked.startswith("node_") and asked.partition("#")[0].partition(":")[0] not in modules:
            near = difflib.get_close_matches(asked, modules, 3, 0.0)
            raise UserError(f"compress.quantize.keep: {asked!r} is no module of this model; nearest: {', '.join(near)}")


def learnt(file: Path) -> tuple[dict[str, list[float]], NDArray[Any]]:
    """Scales by layer, and the converted model's answers, of a `LEARNT` file."""
    with np.load(file) as arrays:
        return {name.removeprefix("scale/"): arrays[name].tolist() for name in arrays.files if name.startswith("scale/")}, arrays["logits"]


# --- layers by name -------------------------------------------------------------------------------------------------


def layers_of(model: Any, plan: Plan) -> dict[str, str]:
    """Node of the plan -> the name a user knows it by: its torch module's path where our export left it, else the node's own.

    A sum or a pool is its module's name and `:sum` or `:pool`; the second of a name is `name#2`. Read off the file as exported: preprocessing drops metadata, keeps names and changes the order.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {}
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        kind = _kind(node, constants)
        layer = next((entry.value for entry in node.metadata_props if entry.key == LAYER), "")
        if kind == "" and node.input[1].endswith(".weight"):  # a convolution that BatchNorm was folded into carries the norm's name
            layer = node.input[1].removesuffix(".weight")
        if layer and kind is not None:
            seen[layer + kind] += 1
            found[node.name] = numbered(layer + kind, seen[layer + kind])
    return {name: found.get(name, name) for name in (*plan.quantized, *plan.kept)}


def _kind(node: Any, constants: Collection[str]) -> str | None:
    if node.op_type in WEIGHTED:
        return "" if node.input[1] in constants else None
    if node.op_type == "Add":
        return None if any(name in constants for name in node.input) else SUM
    return POOL if node.op_type in POOLS else None


def numbered(name: str, count: int) -> str:
    """A name, and the how-manieth of it this is."""
    return name if count == 1 else f"{name}#{count}"


def kept_by_name(keep: Sequence[str], layers: Sequence[str]) -> set[str]:
    """Those of `layers` that are named, or stand in a module that is. Raises UserError for a name that is none, with the nearest ones."""
    kept: set[str] = set()
    for asked in keep:
        hits = {layer for layer in layers if layer == asked or layer.startswith((f"{asked}.", f"{asked}:", f"{asked}#"))}
        if not hits:
            near = difflib.get_close_matches(asked, layers, n=3, cutoff=0.0)
            raise UserError(f"compress.quantize.keep: {asked!r} is no layer that would be quantized, nor a module with one; nearest: {', '.join(near)}")
        kept |= hits
    return kept


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
        self._again: Callable[[], _Rows] = lambda: _Rows(feeds, fixed)
        rows = len(next(iter(feeds.values())))
        # ORT's "entropy" and "percentile" stack the batches into one array, so none may be shorter.
        batch = fixed or next(size for size in range(MAX_BATCH, 0, -1) if rows % size == 0)
        parts = [slice(start, start + batch) for start in range(0, rows - batch + 1, batch)]
        self._feeds: Iterator[dict[str, Any]] = ({name: array[part] for name, array in feeds.items()} for part in parts)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)

    def again(self) -> _Rows:
        """The same rows, from the first."""
        return self._again()


def _quantize(model: Any, out: Path, rows: _Rows, plan: Plan, options: Quantize, precision: str, method: str) -> None:
    types = sorted({node.op_type for node in model.graph.node if node.name in plan.quantized})
    ranges = _entropy_ranges(model, out.with_suffix(".calibrated"), rows, types) if method == "entropy" else {}
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        quantize_static(
            model, out, rows, quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=options.reduce_range and precision == "int8",
            weight_type=QuantType.QInt8, activation_type=QuantType.QInt8, calibrate_method=METHODS[method],
            op_types_to_quantize=types, nodes_to_quantize=list(plan.quantized),
            extra_options={
                # No quantized bias (TensorRT refuses int32 DQ), nothing between a Conv and its ReLU (it would part them).
                "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "OpTypesToExcludeOutputQuantization": types,
                "AddQDQPairToWeight": precision == "fp8",  # leaves the fp32 weights, to be rounded once
                "TensorQuantOverrides": ranges,
            },
        )  # fmt: skip


BINS, LEVELS = 2048, 128  # of a histogram over both signs; steps of 8 bits on one side of zero


def _entropy_ranges(model: Any, work: Path, rows: _Rows, types: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """By tensor the range that loses least of the values' distribution.

    The library's own entropy calibration has as many bins as levels, so that there is one range to choose, the widest: its files were min-max's, byte for byte.
    """
    path = work.with_suffix(".onnx")
    onnx.save(model, path)
    with contextlib.redirect_stdout(io.StringIO()):
        calibrator: Any = create_calibrator(path, types, str(work.with_suffix(".augmented.onnx")), CalibrationMethod.Entropy, extra_options={"num_bins": BINS})
        calibrator.collect_data(rows.again())
    found = {}
    for name, (counts, edges, *_) in calibrator.collector.histogram_dict.items():
        centres = np.abs((edges[1:] + edges[:-1]) / 2)
        most = float(np.abs(edges).max())
        sided, _ = np.histogram(centres, bins=BINS // 2, range=(0, most or 1.0), weights=counts)  # a later batch may have widened it
        limit = np.float32(most * kl_range(sided))
        found[name] = [{"rmin": -limit, "rmax": limit}]
    return found


def kl_range(counts: NDArray[Any]) -> float:
    """How far to go, as a fraction of the whole range, for the least divergence of the quantized values from the clipped ones.

    `counts` [bins]: of absolute values. Migacz 2017, "8-bit inference with TensorRT", GTC.
    """
    counts = counts.astype(np.float64)
    counts[0] = counts[1]  # what a ReLU left nothing of is a zero in any range, and would outweigh all else
    best, least = len(counts), np.inf
    for size in range(LEVELS, len(counts) + 1):
        kept = counts[:size]
        clipped = kept.copy()
        clipped[-1] += counts[size:].sum()
        level = np.arange(size) * LEVELS // size
        filled = np.bincount(level, kept > 0, LEVELS)
        spread = (np.bincount(level, kept, LEVELS) / np.maximum(filled, 1))[level] * (kept > 0)
        divergence = _divergence(clipped, spread)
        if divergence < least:
            best, least = size, divergence
    return best / len(counts)


def _divergence(p: NDArray[Any], q: NDArray[Any]) -> float:
    """Kullback and Leibler's, of counts; a little is everywhere, so that it is finite."""
    p, q = p / max(p.sum(), 1.0) + 1e-9, q / max(q.sum(), 1.0) + 1e-9
    return float((p * np.log(p / q)).sum())


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


def _figures(onnx_in: Path, onnx_out: Path, rows: int, nodes: int, adds: int, precision: str, notes: list[str]) -> dict[str, Any]:
    return {
        "quantized_nodes": nodes, "quantized_adds": adds, "calibration_rows": rows,
        "onnx_bytes_fp32": onnx_in.stat().st_size, f"onnx_bytes_{precision}": onnx_out.stat().st_size, "notes": notes,
    }  # fmt: skip
