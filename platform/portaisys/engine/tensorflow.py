"""An ONNX file as a TensorFlow SavedModel: one small function an operator, of a stated list; whatever is not in it is refused by name.

What is written holds plain operators that TensorFlow had in 2.8, weights as constants, and the signature `serving_default`
with the ONNX file's names; TensorFlow Serving and `tf.saved_model.load` need nothing of this package. Knows no torch.
"""

from __future__ import annotations

import importlib
import keyword
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys import artifact
from portaisys.engine import Arrays, Tensor, check_feeds
from portaisys.engine.cpu import device
from portaisys.engine.onnx_file import Face, face_of, read_onnx
from portaisys.spec import UserError

SIGNATURE = "serving_default"
LEAST_OPSET = 13  # Softmax and the axes of Squeeze meant something else before
_IN_A_SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra", "keras_metadata.pb"}


def version() -> str:
    """Library and version. Raises UserError naming the extra."""
    return f"tensorflow {_library().__version__}"


def save(onnx: Path, folder: Path, check: Callable[[TensorFlowEngine], None] = lambda engine: None) -> list[str]:
    """Write `folder`, whole or not at all; what stood there is replaced last. Returns notes.

    `check`: given the engine of what was written before it takes its place, raises UserError where it must not. Raises UserError
    for operators outside OPERATORS, quantized files, names that no signature can have, and a folder that is not a SavedModel's to replace.
    """
    model = read_onnx(onnx)
    face = face_of(model)
    _refuse(onnx, model, face)
    folder = folder.expanduser().resolve()
    _refuse_place(folder)
    tf = _library()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(tf, onnx, model, face, draft)
            check(load(draft))
            for inner in (draft, *(path for path in draft.rglob("*") if path.is_dir())):
                artifact.sync_folder(inner)
            artifact.replace(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name a folder that can") from error
    return [f"its batch is fixed at {face.batch}, as in the ONNX file"] if face.batch else []


def load(folder: Path) -> TensorFlowEngine:
    """Open a SavedModel. Raises UserError when it is none, is damaged, or has no serving signature."""
    tf = _library()
    try:
        loaded = tf.saved_model.load(str(folder))
        loaded.signatures[SIGNATURE]
    except Exception as error:  # OSError, DecodeError, KeyError, TensorFlow's own: by what is damaged
        raise UserError(f"{folder}: not a SavedModel with the signature {SIGNATURE!r}, or a damaged one ({_first_line(error)}); convert the model again") from error
    return TensorFlowEngine(tf, loaded)


def run(folder: Path, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """What a SavedModel answers. Raises UserError as `load` does, and for wrong names, types or shapes."""
    return load(folder).run(feeds)


class TensorFlowEngine:
    """The serving signature of a SavedModel behind the Engine interface."""

    backend, precision = "tensorflow", "fp32"

    def __init__(self, tf: Any, loaded: Any) -> None:
        self._tf, self._loaded = tf, loaded  # the signature lives as long as what it was loaded with
        self._signature = loaded.signatures[SIGNATURE]
        self.device = device()
        self.inputs = tuple(_tensor(name, spec) for name, spec in self._signature.structured_input_signature[1].items())
        self.outputs = tuple(_tensor(name, spec) for name, spec in self._signature.structured_outputs.items())

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs for a batch of inputs. Raises UserError for wrong names, types or shapes."""
        check_feeds(self.inputs, feeds)
        found = self._signature(**{name: self._tf.constant(array) for name, array in feeds.items()})
        return {tensor.name: found[tensor.name].numpy() for tensor in self.outputs}

    def close(self) -> None:
        """Free the model and its memory."""
        self._loaded = self._signature = None


def _tensor(name: str, spec: Any) -> Tensor:
    return Tensor(name, spec.dtype.name, tuple(-1 if size is None else size for size in spec.shape))


def _library() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it greets on stderr otherwise
    try:
        return importlib.import_module("tensorflow")
    except ImportError:
        raise UserError("TensorFlow is not installed; pip install 'portaisys[tensorflow]'") from None


# --- what is refused ------------------------------------------------------------------------------------------------


def _refuse(path: Path, model: Any, face: Face) -> None:
    if face.quantized:
        raise UserError(f"{path}: is quantized; a SavedModel is made of the fp32 file")
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), LEAST_OPSET)
    if opset < LEAST_OPSET:
        raise UserError(f"{path}: is of opset {opset}; {LEAST_OPSET} on can be converted; export it again, or bring it there with onnx.version_converter")
    unknown = {_kind(node): node for node in reversed(model.graph.node) if _kind(node) not in OPERATORS}
    if unknown:
        named = ", ".join(f"{kind} (node {node.name or node.output[0]!r})" for kind, node in reversed(unknown.items()))
        raise UserError(f"{path}: there is no TensorFlow for {named}; there is for {', '.join(OPERATORS)}; write the model without it, or add it to OPERATORS of engine/tensorflow.py")
    odd = [tensor.name for tensor in face.inputs if not tensor.name.isidentifier() or keyword.iskeyword(tensor.name) or tensor.name == "self"]
    if odd:
        raise UserError(f"{path}: input {odd[0]!r} cannot be the name of an argument in TensorFlow; export the model with letters, digits and _ in input_names")


def _kind(node: Any) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _refuse_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; a SavedModel is a folder, name another")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there and ("saved_model.pb" not in there or there - _IN_A_SAVED_MODEL):
        raise UserError(f"{folder}: holds {min(there - _IN_A_SAVED_MODEL, default='no SavedModel')}, which would be lost; name a new folder, or one that holds a SavedModel alone")


# --- the graph ------------------------------------------------------------------------------------------------------


def _write(tf: Any, path: Path, model: Any, face: Face, folder: Path) -> None:
    specs = {tensor.name: tf.TensorSpec([None if size < 0 else size for size in tensor.shape], tensor.dtype) for tensor in face.inputs}

    def answer(**feeds: Any) -> dict[str, Any]:
        return _traced(tf, path, model, face, feeds)

    traced = tf.function(answer, autograph=False).get_concrete_function(**specs)
    level = tf.get_logger().level
    tf.get_logger().setLevel("ERROR")  # it tells of every file it writes
    try:
        tf.saved_model.save(tf.Module(), str(folder), signatures={SIGNATURE: traced})
    finally:
        tf.get_logger().setLevel(level)


def _traced(tf: Any, path: Path, model: Any, face: Face, feeds: dict[str, Any]) -> dict[str, Any]:
    """The graph's outputs. Constants are numpy arrays until an operator takes them: what depends on them alone is computed here and now."""
    from onnx import numpy_helper

    values: dict[str, Any] = {"": None, **{tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}, **feeds}
    for node in model.graph.node:
        found = _computed(tf, path, node, [values[name] for name in node.input])
        values |= zip(node.output, found if isinstance(found, (tuple, list)) else [found], strict=False)
    for tensor in face.outputs:
        if tensor.name not in values:
            raise UserError(f"{path}: its output {tensor.name!r} is a second output of an operator that gives only its first here")
    outputs = {tensor.name: tf.identity(values[tensor.name]) for tensor in face.outputs}
    for tensor in face.outputs:
        stated = tf.TensorShape([None if size < 0 else size for size in tensor.shape])
        if stated.is_compatible_with(outputs[tensor.name].shape):  # not where the file states none
            outputs[tensor.name].set_shape(stated)
    return outputs


def _computed(tf: Any, path: Path, node: Any, args: list[Any]) -> Any:
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute} | {"outputs": len(node.output)}
    try:
        if not all(arg is None or isinstance(arg, np.ndarray) for arg in args):
            return OPERATORS[node.op_type](tf, args, attributes)
        with tf.init_scope():
            found = OPERATORS[node.op_type](tf, args, attributes)
            return [np.asarray(one) for one in found] if isinstance(found, (tuple, list)) else np.asarray(found)
    except Exception as error:  # TensorFlow raises ValueError, TypeError and a tree of its own
        raise UserError(f"{path}: {node.op_type} (node {node.name or node.output[0]!r}) cannot be converted: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- operators: (tensorflow, inputs, attributes) -> output, or several ------------------------------------------------


def _sizes(tf: Any, x: Any) -> list[Any]:
    """Of every dimension its number, or a scalar int64 where it is free."""
    return [tf.shape(x, out_type=tf.int64)[axis] if size is None else size for axis, size in enumerate(x.shape)]


def _known(tf: Any, value: Any, what: str) -> list[int]:
    found = tf.get_static_value(value)
    if found is None:
        raise ValueError(f"its {what} are computed from the inputs; only constant ones are known here")
    return [int(one) for one in np.ravel(found)]


def _axes(tf: Any, args: Sequence[Any], attributes: dict[str, Any]) -> list[int] | None:
    """Of an input since opset 13 or 18, of an attribute before; None where there are none."""
    if len(args) > 1 and args[1] is not None:
        return _known(tf, args[1], "axes")
    return attributes.get("axes")


def _divided(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    x, y = (tf.convert_to_tensor(arg) for arg in args)
    return tf.truediv(x, y) if x.dtype.is_floating else tf.truncatediv(x, y)


def _power(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    x, exponent = (tf.convert_to_tensor(arg) for arg in args)
    return tf.pow(x, tf.cast(exponent, x.dtype))


def _folded(operator: str) -> Callable[[Any, list[Any], dict[str, Any]], Any]:
    """Of two into one of any number."""
    return lambda tf, args, attributes: reduce(getattr(tf, operator), args)


def _clip(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    x, least, most = (*args, None, None)[:3]
    x = x if least is None else tf.maximum(x, least)
    return x if most is None else tf.minimum(x, most)


def _gelu(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    return tf.nn.gelu(args[0], approximate=attributes.get("approximate", b"none") == b"tanh")


def _cast(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    from onnx import helper

    return tf.cast(args[0], tf.as_dtype(helper.tensor_dtype_to_np_dtype(attributes["to"])))


def _constant(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    from onnx import numpy_helper

    if "value" in attributes:
        return numpy_helper.to_array(attributes["value"])
    ((name, value),) = ((name, value) for name, value in attributes.items() if name != "outputs")
    return np.asarray(value, {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}[name])


def _filled(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    from onnx import numpy_helper

    value = numpy_helper.to_array(attributes["value"]).reshape(()) if "value" in attributes else np.float32(0)
    return tf.fill(args[0], value)


def _shape(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    part = slice(attributes.get("start", 0), attributes.get("end"))
    sizes = list(args[0].shape)[part]
    return tf.shape(args[0], out_type=tf.int64)[part] if None in sizes else np.array(sizes, np.int64)


def _reshape(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    """A 0 keeps the dimension of its place, unless `allowzero`."""
    x, target = args
    known = tf.get_static_value(target)
    if attributes.get("allowzero", 0) or (known is not None and 0 not in known):
        return tf.reshape(x, target)
    length = target.shape[0]
    own = tf.concat([tf.shape(x, out_type=tf.int64), tf.ones([length], tf.int64)], 0)[:length]
    return tf.reshape(x, tf.where(tf.equal(target, 0), own, target))


def _flatten(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    sizes, axis = _sizes(tf, args[0]), attributes.get("axis", 1)
    return tf.reshape(args[0], tf.stack([tf.cast(prod(part), tf.int64) for part in (sizes[:axis], sizes[axis:])]))


def _transpose(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    return tf.transpose(args[0], attributes.get("perm"))


def _squeeze(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    return tf.squeeze(args[0], _axes(tf, args, attributes))


def _unsqueeze(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    axes = _axes(tf, args, attributes) or []
    rank = len(args[0].shape) + len(axes)
    return reduce(tf.expand_dims, sorted(axis % rank for axis in axes), args[0])


def _split(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    x, axis, count = args[0], attributes.get("axis", 0), attributes["outputs"]
    if len(args) > 1 and args[1] is not None:
        return tf.split(x, _known(tf, args[1], "sizes"), axis)
    each = -(-x.shape[axis] // count)
    return tf.split(x, [each] * (count - 1) + [x.shape[axis] - each * (count - 1)], axis)


def _slice(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    """Beyond an end is up to it, in both; so what is not sliced goes from 0 to the largest number."""
    x, starts, ends, axes, steps = (*args, None, None)[:5]
    rank, count = len(x.shape), starts.shape[0]
    begin, end, stride = [0] * rank, [np.iinfo(np.int64).max] * rank, [1] * rank
    for index, axis in enumerate(range(count) if axes is None else _known(tf, axes, "axes")):
        stride[axis] = 1 if steps is None else _known(tf, steps, "steps")[index]
        begin[axis], end[axis] = _within(x.shape[axis], starts[index], ends[index], stride[axis])
    return tf.strided_slice(x, *(tf.stack([tf.cast(one, tf.int64) for one in part]) for part in (begin, end, stride)))


def _within(size: int | None, start: Any, end: Any, step: int) -> tuple[Any, Any]:
    """Exporters write the least int64 for "from the start", at which TensorFlow's layout optimizer gives up."""
    if size is None or step < 0 or not (isinstance(start, np.integer) and isinstance(end, np.integer)):
        return start, end
    return slice(int(start), int(end)).indices(size)[:2]


def _from_start(tf: Any, indices: Any, sizes: Any) -> Any:
    """A negative index counts from the end; TensorFlow knows none."""
    if isinstance(indices, np.ndarray) and (indices >= 0).all():
        return indices
    indices = tf.convert_to_tensor(indices)
    return tf.where(indices < 0, indices + tf.cast(sizes, indices.dtype), indices)


def _gather(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    axis = attributes.get("axis", 0)
    return tf.gather(args[0], _from_start(tf, args[1], _sizes(tf, args[0])[axis]), axis=axis)


def _gather_elements(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    axis = attributes.get("axis", 0)
    indices = _from_start(tf, args[1], _sizes(tf, args[0])[axis])
    places = tf.meshgrid(*(tf.range(tf.cast(size, tf.int64)) for size in _sizes(tf, indices)), indexing="ij")
    places[axis] = tf.cast(indices, tf.int64)
    return tf.gather_nd(args[0], tf.stack(places, -1))


def _gather_nd(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    skipped = attributes.get("batch_dims", 0)
    sizes = tf.shape(args[0], out_type=tf.int64)[skipped : skipped + args[1].shape[-1]]
    return tf.gather_nd(args[0], _from_start(tf, args[1], sizes), batch_dims=skipped)


def _expand(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    return tf.broadcast_to(args[0], tf.broadcast_dynamic_shape(tf.shape(args[0], out_type=tf.int64), args[1]))


def _pad(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    x, pads, value, axes = (*args, None, None)[:4]
    sizes, rank = _known(tf, pads, "pads"), len(x.shape)
    chosen = list(range(rank)) if axes is None else _known(tf, axes, "axes")
    table = [[0, 0] for _ in range(rank)]
    for axis, before, after in zip(chosen, sizes[: len(chosen)], sizes[len(chosen) :], strict=True):
        table[axis] = [before, after]
    mode = attributes.get("mode", b"constant").decode()
    if mode not in ("constant", "reflect"):
        raise ValueError(f"mode {mode!r} is none that TensorFlow has")
    return tf.pad(x, table, mode.upper(), 0 if value is None else tf.reshape(value, []))


def _reduced(operator: str) -> Callable[[Any, list[Any], dict[str, Any]], Any]:
    def reduced(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
        axes = _axes(tf, args, attributes) or None
        if axes is None and attributes.get("noop_with_empty_axes", 0):
            return args[0]
        return getattr(tf, operator)(args[0], axes, keepdims=bool(attributes.get("keepdims", 1)))

    return reduced


def _argmax(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    if attributes.get("select_last_index", 0):
        raise ValueError("select_last_index is none that TensorFlow has")
    axis = attributes.get("axis", 0)
    found = tf.argmax(args[0], axis, output_type=tf.int64)
    return tf.expand_dims(found, axis) if attributes.get("keepdims", 1) else found


def _matmul(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    """Matrices on the right of a stack are multiplied with all of it at once."""
    x, y = args
    if len(x.shape) < 2 or len(y.shape) < 2:
        return tf.tensordot(x, y, [[-1], [max(0, len(y.shape) - 2)]])
    if len(y.shape) > 2 or len(x.shape) == 2:
        return tf.matmul(x, y)
    rows = tf.matmul(tf.reshape(x, [-1, y.shape[0]]), y)
    return tf.reshape(rows, tf.stack([tf.cast(size, tf.int64) for size in (*_sizes(tf, x)[:-1], y.shape[1])]))


def _gemm(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    x, y, bias = (*args, None)[:3]
    found = tf.matmul(x, y, transpose_a=bool(attributes.get("transA", 0)), transpose_b=bool(attributes.get("transB", 0)))
    found = found if attributes.get("alpha", 1.0) == 1 else found * attributes["alpha"]
    return found if bias is None else found + (bias if attributes.get("beta", 1.0) == 1 else bias * np.float32(attributes["beta"]))


def _layer_norm(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    x, scale, bias = (*args, None)[:3]
    rank = len(x.shape)
    mean, variance = tf.nn.moments(x, list(range(attributes.get("axis", -1) % rank, rank)), keepdims=True)
    return tf.nn.batch_normalization(x, mean, variance, bias, scale, attributes.get("epsilon", 1e-5))


def _batch_norm(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    if attributes.get("training_mode", 0):
        raise ValueError("it is in training mode; export the model after model.eval()")
    x = args[0]
    scale, bias, mean, variance = (tf.reshape(arg, [-1] + [1] * (len(x.shape) - 2)) for arg in args[1:])
    return tf.nn.batch_normalization(x, mean, variance, bias, scale, attributes.get("epsilon", 1e-5))


# Pictures: ONNX has channels in dimension 1, TensorFlow's CPU kernels have them last.


def _channels_last(tf: Any, x: Any) -> Any:
    return tf.transpose(x, [0, *range(2, len(x.shape)), 1])


def _channels_first(tf: Any, x: Any) -> Any:
    return tf.transpose(x, [0, len(x.shape) - 1, *range(1, len(x.shape) - 1)])


def _padded(tf: Any, x: Any, attributes: dict[str, Any], fill: float = 0.0) -> tuple[Any, str]:
    """x_BHWC with its borders, and what TensorFlow is told of padding."""
    auto, pads = attributes.get("auto_pad", b"NOTSET").decode(), attributes.get("pads", [])
    if auto == "SAME_LOWER":
        raise ValueError("auto_pad SAME_LOWER is none that TensorFlow has; export it with pads")
    if auto != "NOTSET" or not any(pads):
        return x, "SAME" if auto == "SAME_UPPER" else "VALID"
    half = len(pads) // 2
    return tf.pad(x, [[0, 0], *zip(pads[:half], pads[half:], strict=True), [0, 0]], constant_values=fill), "VALID"


def _conv(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    x, weight, bias = (*args, None)[:3]
    spatial = len(weight.shape) - 2
    strides, dilations = (list(attributes.get(name, [1] * spatial)) for name in ("strides", "dilations"))
    x, padding = _padded(tf, _channels_last(tf, x), attributes)
    y = _convolved(tf, x, weight, attributes.get("group", 1), strides, dilations, padding)
    return _channels_first(tf, y if bias is None else tf.nn.bias_add(y, bias))


def _convolved(tf: Any, x: Any, weight: Any, groups: int, strides: list[int], dilations: list[int], padding: str) -> Any:
    """x_BHWC with weight_OIHW; TensorFlow's CPU has groups of one channel only, others are convolved one by one."""
    spatial = list(range(2, len(weight.shape)))
    if groups > 1 and weight.shape[1] == 1 and len(spatial) == 2 and strides[0] == strides[1]:
        per_channel = np.reshape if isinstance(weight, np.ndarray) else tf.reshape
        filters = tf.transpose(per_channel(weight, [groups, -1, *weight.shape[2:]]), [2, 3, 0, 1])
        return tf.nn.depthwise_conv2d(x, filters, [1, *strides, 1], padding, dilations=dilations)
    filters = np.transpose(weight, [*spatial, 1, 0]) if isinstance(weight, np.ndarray) else tf.transpose(weight, [*spatial, 1, 0])
    parts = zip(tf.split(x, groups, -1), tf.split(filters, groups, -1), strict=True) if groups > 1 else [(x, filters)]
    found = [tf.nn.convolution(part, kernel, strides=strides, padding=padding, dilations=dilations) for part, kernel in parts]
    return tf.concat(found, -1) if groups > 1 else found[0]


def _pooled(tf: Any, args: list[Any], attributes: dict[str, Any], pool: Any, fill: float) -> Any:
    if attributes.get("ceil_mode", 0) or any(size != 1 for size in attributes.get("dilations", [])):
        raise ValueError("ceil_mode and dilations are none that TensorFlow has")
    kernel = list(attributes["kernel_shape"])
    x, padding = _padded(tf, _channels_last(tf, args[0]), attributes, fill)
    return _channels_first(tf, pool(x, kernel, list(attributes.get("strides", [1] * len(kernel))), padding))


def _max_pool(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    return _pooled(tf, args, attributes, tf.nn.max_pool, -np.inf)


def _average_pool(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    """Zeros at the borders do not count, unless `count_include_pad`: the same pooling of ones says how much was counted."""
    found = _pooled(tf, args, attributes, tf.nn.avg_pool, 0.0)
    if attributes.get("count_include_pad", 0) or not any(attributes.get("pads", [])):
        return found
    return found / _pooled(tf, [tf.ones_like(args[0])], attributes, tf.nn.avg_pool, 0.0)


def _global_average_pool(tf: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    return tf.reduce_mean(args[0], list(range(2, len(args[0].shape))), keepdims=True)


OPERATORS: dict[str, Callable[[Any, list[Any], dict[str, Any]], Any]] = {
    # numbers
    "Add": lambda tf, args, attributes: tf.add(*args),
    "Sub": lambda tf, args, attributes: tf.subtract(*args),
    "Mul": lambda tf, args, attributes: tf.multiply(*args),
    "Div": _divided,
    "Pow": _power,
    "Neg": lambda tf, args, attributes: tf.negative(*args),
    "Abs": lambda tf, args, attributes: tf.abs(*args),
    "Sqrt": lambda tf, args, attributes: tf.sqrt(*args),
    "Reciprocal": lambda tf, args, attributes: tf.math.reciprocal(*args),
    "Exp": lambda tf, args, attributes: tf.exp(*args),
    "Log": lambda tf, args, attributes: tf.math.log(*args),
    "Erf": lambda tf, args, attributes: tf.math.erf(*args),
    "Min": _folded("minimum"),
    "Max": _folded("maximum"),
    "Clip": _clip,
    # activations
    "Relu": lambda tf, args, attributes: tf.nn.relu(*args),
    "LeakyRelu": lambda tf, args, attributes: tf.nn.leaky_relu(args[0], attributes.get("alpha", 0.01)),
    "Sigmoid": lambda tf, args, attributes: tf.sigmoid(*args),
    "Tanh": lambda tf, args, attributes: tf.tanh(*args),
    "Gelu": _gelu,
    "Softmax": lambda tf, args, attributes: tf.nn.softmax(args[0], attributes.get("axis", -1)),
    "LogSoftmax": lambda tf, args, attributes: tf.nn.log_softmax(args[0], attributes.get("axis", -1)),
    # comparisons
    "Equal": lambda tf, args, attributes: tf.equal(*args),
    "Less": lambda tf, args, attributes: tf.less(*args),
    "LessOrEqual": lambda tf, args, attributes: tf.less_equal(*args),
    "Greater": lambda tf, args, attributes: tf.greater(*args),
    "GreaterOrEqual": lambda tf, args, attributes: tf.greater_equal(*args),
    "And": lambda tf, args, attributes: tf.logical_and(*args),
    "Or": lambda tf, args, attributes: tf.logical_or(*args),
    "Not": lambda tf, args, attributes: tf.logical_not(*args),
    "IsNaN": lambda tf, args, attributes: tf.math.is_nan(*args),
    "Where": lambda tf, args, attributes: tf.where(*args),
    # shapes and places
    "Identity": lambda tf, args, attributes: args[0],
    "Cast": _cast,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Range": lambda tf, args, attributes: tf.range(*args),
    "Shape": _shape,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda tf, args, attributes: tf.concat(args, attributes["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Expand": _expand,
    "Tile": lambda tf, args, attributes: tf.tile(*args),
    "Pad": _pad,
    # sums
    "ReduceMean": _reduced("reduce_mean"),
    "ReduceSum": _reduced("reduce_sum"),
    "ReduceMax": _reduced("reduce_max"),
    "ReduceMin": _reduced("reduce_min"),
    "ArgMax": _argmax,
    "MatMul": _matmul,
    "Gemm": _gemm,
    # layers
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
}
