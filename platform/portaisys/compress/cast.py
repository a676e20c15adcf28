"""fp16 and bf16 versions of an fp32 ONNX file, with the nodes that cannot bear it left in fp32: ONNX to ONNX.

TensorRT takes precision from the tensors' types and nothing else, so these files are what its engines are built from. A
quantized file becomes a mixed one the same way: what is between Q and DQ is int8, the rest is cast. Judged by onnx.reference,
which rounds after every operator; ONNX Runtime's CPU provider computes in fp32 in between and hides overflows (docs/log.md).
Our own, since onnxruntime.transformers.float16 gave NaN with four nodes in its block list. Knows neither engines nor speed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from portaisys.artifact import write_bytes
from portaisys.engine import Arrays
from portaisys.engine.onnx_file import read_onnx
from portaisys.spec import UserError

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Sums of squares and of exponentials leave fp16's range long before their result does (TensorRT #2564, #4493).
SENSITIVE = {"LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "Softmax", "LogSoftmax", "Exp", "Pow", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "CumSum"}
# Their types are fixed, come from an attribute, or belong to a graph of their own.
UNTOUCHED = {"If", "Loop", "Scan", "ConstantOfShape", "Range", "EyeLike", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "NonMaxSuppression", "Optional"}
FP32_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}
MOST_FP16, LEAST_FP16 = 65504.0, 6e-8
MOST_TRIALS = 200
GUARDED, GUARD = {"Max", "Clip", "Add"}, 6.2e-5  # fp16's least normal number, and no more
FLIPPED = 0.5  # of the largest answer: beyond it something overflowed


@dataclass(frozen=True)
class Report:
    """What became of a file. `islands`: names of the nodes kept in fp32 because the answers were wrong without; `error`: of the largest answer."""

    islands: tuple[str, ...]
    error: float
    trials: int
    notes: tuple[str, ...]


def cast(onnx_in: Path, onnx_out: Path, precision: str, *, keep: Collection[str] = ()) -> list[str]:
    """Write `onnx_out`: weights and activations in `precision` but for the nodes in `keep` and those that are kept by rule; inputs and outputs stay fp32.

    Returns notes on what was kept. The same input gives the same bytes. Raises UserError for a file that cannot be read.
    """
    model, notes = cast_model(_of_opset(read_onnx(onnx_in, external=False), precision), precision, keep)
    write_bytes(onnx_out, model.SerializeToString(deterministic=True))
    return notes


def with_islands(onnx_in: Path, onnx_out: Path, precision: str, feeds: Arrays, tolerance: float) -> Report:
    """`cast`, and where the answers to `feeds` are not finite or further than `tolerance` of the largest from fp32's, with fp32 islands.

    The islands are a minimal set: QuickXplain (Junker 2004, AAAI, p. 167), about k log(n / k) trials for k islands among n nodes.
    A quantized file is held against its own answers only FLIPPED near: the least change makes roundings fall the other way, which no
    island undoes (MiniLM: 0.228, and nearer to fp32 than before); how accurate it is, the gate measures. Raises UserError when no set within MOST_TRIALS trials gives the answers.
    """
    model = _of_opset(read_onnx(onnx_in, external=False), precision)
    right = _answers(onnx_in, model, feeds)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        tolerance = max(tolerance, FLIPPED)
    names = [node.name for node in _named(model).graph.node]
    trials = 0

    def passes(keep: Sequence[str]) -> bool:
        nonlocal trials
        trials += 1
        if trials > MOST_TRIALS:
            raise UserError(f"{onnx_in}: more than {MOST_TRIALS} trials did not find what {precision} must leave in fp32; use fp32")
        return error_of(cast_model(model, precision, keep)[0], feeds, right) <= tolerance

    islands = [] if passes([]) else _minimal(names, [], passes)
    made, notes = cast_model(model, precision, islands)
    error = error_of(made, feeds, right)
    if error > tolerance:
        raise UserError(f"{onnx_in}: {precision} differs by {error:.2g} (bound {tolerance:g}) whatever is kept in fp32; use fp32")
    if islands:
        notes.append(f"{precision}: kept in fp32 because the answers were wrong without: {', '.join(islands)}")
    write_bytes(onnx_out, made.SerializeToString(deterministic=True))
    return Report(tuple(islands), error, trials, tuple(notes))


def _answers(path: Path, model: Any, feeds: Arrays) -> list[NDArray[Any]]:
    try:
        found: list[NDArray[Any]] = ReferenceEvaluator(model).run(None, dict(feeds))
    except Exception as error:  # it raises whatever its operators raise, and knows none of other domains
        raise UserError(f"{path}: cannot be evaluated to find what must stay in fp32 ({type(error).__name__}: {str(error).splitlines()[0][:200]}); use fp32") from error
    return found


def _minimal(names: Sequence[str], kept: list[str], passes: Callable[[Sequence[str]], bool], check: bool = False) -> list[str]:
    """A minimal part of `names` that, kept with `kept`, passes; all of `names` with `kept` does."""
    if check and passes(kept):
        return []
    if len(names) == 1:
        return list(names)
    left, right = names[: len(names) // 2], names[len(names) // 2 :]
    second = _minimal(right, [*kept, *left], passes, check=True)
    return _minimal(left, [*kept, *second], passes, check=bool(second)) + second


def error_of(model: Any, feeds: Arrays, right: Sequence[NDArray[Any]]) -> float:
    """The largest difference from `right` over the largest answer, of float outputs; infinite when one is no number."""
    worst = 0.0
    with np.errstate(all="ignore"):
        found = ReferenceEvaluator(model).run(None, dict(feeds))
    for expected, answer in zip(right, found, strict=True):
        if expected.dtype.kind == "f":
            if not np.isfinite(answer).all():
                return float("inf")
            worst = max(worst, float(np.abs(answer - expected).max()) / (float(np.abs(expected).max()) or 1.0))
    return worst


# --- the graph ------------------------------------------------------------------------------------------------------


def cast_model(model: Any, precision: str, keep: Collection[str]) -> tuple[Any, list[str]]:
    """A cast copy of a model, and notes. A tensor's own name always means its fp32 form; the low one is `name.fp16`."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, low = _named(made).graph, TYPES[precision]
    floats = _float_tensors(model)
    constants = {tensor.name: tensor for tensor in graph.initializer} | {node.output[0]: node.attribute[0].t for node in graph.node if _is_constant(node)}
    notes: list[str] = []
    kept = {node.name for node in graph.node if node.name in keep or _stays(node, made, constants, precision, notes)}
    nodes: list[Any] = []
    wanted: dict[str, set[bool]] = {}  # float tensor -> whether its low form (True), its fp32 form (False) is read

    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in floats:
                is_low = node.name not in kept and index not in FP32_INPUTS.get(node.op_type, ())
                wanted.setdefault(name, set()).add(is_low)
                node.input[index] = f"{name}.{precision}" if is_low else name
        for name in _captured(node):
            wanted.setdefault(name, set()).add(False)
    for value in graph.output:
        wanted.setdefault(value.name, set()).add(False)

    for value in graph.input:
        nodes += _to_low(value.name, precision, low) if True in wanted.get(value.name, ()) and value.name not in constants else []
    for node in graph.node:
        made_floats = [name for name in node.output if name in floats]
        nodes.append(node)
        if _is_constant(node) or not made_floats:
            continue
        if node.name in kept:
            nodes += [step for name in made_floats if True in wanted.get(name, ()) for step in _to_low(name, precision, low)]
            continue
        for index, name in enumerate(node.output):
            if name in floats:
                node.output[index] = f"{name}.{precision}"
        _retype(node, low)
        nodes += [helper.make_node("Cast", [f"{name}.{precision}"], [name], name=f"{name}.to_fp32", to=TensorProto.FLOAT) for name in made_floats if False in wanted.get(name, ())]
    initializers = [tensor for tensor in graph.initializer if tensor.name not in floats or False in wanted.get(tensor.name, ())]
    initializers += [_low_constant(tensor, name, precision, low) for name, tensor in constants.items() if name in floats and True in wanted.get(name, ())]
    for field, values in ((graph.node, _needed(nodes, graph)), (graph.initializer, initializers), (graph.value_info, [])):
        del field[:]
        field.extend(values)
    return made, notes


def _of_opset(model: Any, precision: str) -> Any:
    """The model, brought to the first opset whose Conv takes bfloat16 where that is asked of it."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return onnx.version_converter.convert_version(model, 22) if precision == "bf16" and opset < 22 else model


def _named(model: Any) -> Any:
    """The model with a name on every node, since islands are spoken of by name."""
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def _float_tensors(model: Any) -> set[str]:
    """Names of the float32 tensors of the outermost graph."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    typed = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    typed |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name for name, kind in typed.items() if kind == TensorProto.FLOAT}


def _is_constant(node: Any) -> bool:
    return bool(node.op_type == "Constant" and node.attribute[0].name == "value")


def _stays(node: Any, model: Any, constants: dict[str, Any], precision: str, notes: list[str]) -> bool:
    """Whether a node is fp32 by rule: of its kind, of its types in this opset, or for a number that the low type has not."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if node.op_type in UNTOUCHED or node.domain not in ("", "ai.onnx") or (precision == "fp16" and node.op_type in SENSITIVE):
        return True
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and opset < 19:
        return True
    if precision != "fp16" or _is_constant(node):
        return False
    for name in node.input:
        tensor = constants.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            continue
        values = np.abs(numpy_helper.to_array(tensor))
        if _guards(node, values):
            notes.append(f"fp16: {node.name}: {name} is {float(values.max()):.0e}, which would be 0: it becomes {GUARD:.0e}, still no division by zero")
            continue
        vanishes = values.size == 1 and 0 < values.max() < LEAST_FP16  # among weights it is nothing
        if node.op_type.endswith("QuantizeLinear"):
            vanishes = values.min(initial=1) < LEAST_FP16
        if vanishes or values.max(initial=0) > MOST_FP16:
            notes.append(f"fp16: {node.name} stays in fp32: {name} holds numbers that fp16 has not")
            return True
    return False


def _guards(node: Any, values: NDArray[Any]) -> bool:
    """Whether these are a guard against dividing by zero, as F.normalize's 1e-12 and BatchNorm's 1e-5, that fp16 would make zero."""
    return node.op_type in GUARDED and values.size == 1 and 0 < float(values.max()) < LEAST_FP16


def _captured(node: Any) -> Iterator[str]:
    """Names that the graphs inside a node read, theirs and those of the graph around."""
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)


def _to_low(name: str, precision: str, low: int) -> list[Any]:
    return [helper.make_node("Cast", [name], [f"{name}.{precision}"], name=f"{name}.to_{precision}", to=low)]


def _retype(node: Any, low: int) -> None:
    """What says float32 in an attribute of a low node."""
    for attribute in node.attribute:
        if (node.op_type, attribute.name) in (("Cast", "to"), ("DequantizeLinear", "output_dtype")) and attribute.i == TensorProto.FLOAT:
            attribute.i = low


def _low_constant(tensor: Any, name: str, precision: str, low: int) -> Any:
    values = numpy_helper.to_array(tensor)
    if precision == "fp16" and values.size == 1 and 0 < float(np.abs(values).max()) < LEAST_FP16:  # a guard: other nodes with such numbers stay in fp32
        values = np.full_like(values, GUARD)
    made = numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(low)), f"{name}.{precision}")
    assert made.data_type == low
    return made


def _needed(nodes: Sequence[Any], graph: Any) -> list[Any]:
    """Without constants and casts that nothing reads any more."""
    read = {value.name for value in graph.output} | {name for node in nodes for name in (*node.input, *_captured(node))}
    return [node for node in nodes if any(name in read for name in node.output) or not (_is_constant(node) or node.op_type == "Cast")]
