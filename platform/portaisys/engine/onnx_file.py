"""A user's ONNX file, read so that it can do no harm and depends on nothing beside it; and what it takes and gives.

External data is read and put inside the model, but only from plain files in the model's own folder, checked on the opened
file itself: `..`, absolute paths, links, devices and lengths that are not the tensor's were all ways to read what was not
the model's (CVE-2022-25882, -2024-27318, -2024-5187, -2025-51480, -2026-27489, -34445, -34446, -34447). Builds nothing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from portaisys.engine import Tensor
from portaisys.spec import UserError

LEAST_OPSET = 11
LAYER = "portaisys.layer"  # metadata of a node: the torch module that it computes, by its path
MOST_BYTES = 2**31 - 2**20  # protobuf's bound on one message
_ITEM_BITS = {2: 8, 3: 8, 4: 16, 5: 16, 1: 32, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8}


def read_onnx(path: Path, *, external: bool = True) -> Any:
    """The checked, self-contained `onnx.ModelProto` of a file. Raises UserError when there is none, it is damaged, of another opset or reaches outside.

    `external`: whether it may have data in files beside it, which go inside.
    """
    import onnx  # 0.3 s, and whoever only names a type of this package does not need it
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
        _check_opset(path, model)
        _put_inside(path, model, external)
        onnx.checker.check_model(model)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); export the model again") from None
    except (DecodeError, onnx.checker.ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not an ONNX file, or a damaged one ({_first_line(error)}); export the model again") from None
    except Exception as error:  # the checker's C++ raises what it likes (RuntimeError, ValueError) on bytes that are no model
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not an ONNX file, or a damaged one ({_first_line(error)}); export the model again") from None
    return model


_FLOAT = 1
_LOW = {10: "fp16", 16: "bf16"}  # TensorProto.FLOAT16 and BFLOAT16
_FP8 = {17, 18, 19, 20}  # FLOAT8E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ


def read_for(path: Path, types: str) -> Any:
    """`read_onnx`, and its types are `types` ("fp32", "fp16", "bf16", "int8" or "fp8"): engines take them from the file, not from a flag."""
    model = read_onnx(path, external=False)
    quantized = _quantized_to(model)
    low = _low_of(model.graph)
    if quantized != (types if types in ("int8", "fp8") else ""):
        what = f"is quantized to {quantized}" if quantized else f"holds no QuantizeLinear, so an {types} engine of it would be fp32"
        raise UserError(f"engine.precisions: {types!r} was asked for, but {path} {what}; give the file of the right stage (quantize makes the int8 one)")
    if not quantized and types != low:
        raise UserError(f"engine.precisions: {types!r} was asked for, but the weights in {path} are {low}; give the file of the right stage (cast makes the low ones)")
    return model


def _low_of(graph: Any) -> str:
    """"fp16", "bf16" or "fp32", by the weights; where there are none, by what inputs are cast to."""
    kinds = [tensor.data_type for tensor in graph.initializer if tensor.data_type in (_FLOAT, *_LOW)]
    kinds = kinds or [attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute if attribute.name == "to"]
    return next((_LOW[kind] for kind in kinds if kind in _LOW), "fp32")


def quantized_parts(path: Path) -> tuple[bool, bool]:
    """Of a quantized file: whether activations are quantized, not weights alone; and whether scales are fp16 or bf16, since what is between Q and DQ is cast."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    low = {tensor.name for tensor in graph.initializer if tensor.data_type in _LOW}
    steps = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return any(node.op_type == "QuantizeLinear" for node in steps), any(node.input[1] in low for node in steps)


def _quantized_to(model: Any) -> str:
    """"int8", "fp8", or nothing."""
    if not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):  # of weights alone: the latter only
        return ""
    return "fp8" if any(tensor.data_type in _FP8 for tensor in model.graph.initializer) else "int8"


def _check_opset(path: Path, model: Any) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if not model.HasField("graph") or not opsets:
        raise UserError(f"{path}: not an ONNX file, or a damaged one (no graph or no opset); export the model again")
    opset = opsets.get("", opsets.get("ai.onnx", newest))
    if not LEAST_OPSET <= opset <= newest:
        raise UserError(f"{path}: is of opset {opset}; {LEAST_OPSET} to {newest} are known here; export it again, or bring it there with onnx.version_converter")


# --- external data ---------------------------------------------------------------------------------------------------


def _put_inside(path: Path, model: Any, allowed: bool) -> None:
    import onnx

    outside = [tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if outside and not allowed:
        raise UserError(f"{path}: {len(outside)} weights are in another file, which caches would miss; `portaisys compile` puts them inside")
    total = sum(_wanted_bytes(path, tensor) for tensor in outside)
    if total > MOST_BYTES:
        raise UserError(f"{path}: its external data is {total / 2**30:.1f} GiB; at most 2 GiB go into one file; split the model, or store it in float16")
    if not outside:
        return
    folder = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for tensor in outside:
            tensor.raw_data = _read(path, folder, tensor)
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    finally:
        os.close(folder)


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor a model holds: of graphs in graphs, functions and training steps too."""
    graphs = [model.graph]
    for step in model.training_info:
        graphs += [step.initialization, step.algorithm]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from (tensor for sparse in graph.sparse_initializer for tensor in (sparse.values, sparse.indices))
            nodes += graph.node
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            yield from attribute.tensors
            yield from (tensor for sparse in attribute.sparse_tensors for tensor in (sparse.values, sparse.indices))
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
        nodes = []


def _wanted_bytes(path: Path, tensor: Any) -> int:
    """What the tensor's dims and type need. Raises UserError when that is nothing a tensor can have."""
    bits = _ITEM_BITS.get(tensor.data_type)
    if bits is None or any(size < 0 for size in tensor.dims):
        raise UserError(f"{path}: {_name(tensor)} cannot have external data: its type or dims are none that do; export the model again")
    return (prod(int(size) for size in tensor.dims) * bits + 7) // 8


def _read(path: Path, folder: int, tensor: Any) -> bytes:
    about = {entry.key: entry.value for entry in tensor.external_data}
    where, wanted = about.get("location", ""), _wanted_bytes(path, tensor)
    offset, length = _number(path, tensor, about.get("offset", "0")), _number(path, tensor, about.get("length", str(wanted)))
    if not where or where in (".", "..") or re.search(r"[/\\\0]", where):
        raise UserError(f"{path}: {_name(tensor)} has its data in {where!r}; only a plain file name in the model's own folder is read")
    try:
        # Not a link, and no waiting for a pipe's other end; what is checked below is the file that was opened, not a name.
        handle = os.open(where, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise UserError(f"{path}: {where}, which holds {_name(tensor)}, cannot be read ({error.strerror}); keep model and data together, as plain files") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise UserError(f"{path}: {where}, which holds {_name(tensor)}, is no plain file of its own (a device, pipe or hard link); copy the model anew")
        if length != wanted or offset + length > found.st_size:
            raise UserError(
                f"{path}: {_name(tensor)} needs {wanted} bytes; the file says {length} at {offset} of {where}, which has {found.st_size}; export the model again"
            )
        with os.fdopen(os.dup(handle), "rb") as stream:
            stream.seek(offset)
            return stream.read(length)
    finally:
        os.close(handle)


def _number(path: Path, tensor: Any, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise UserError(f"{path}: {_name(tensor)} has {text[:40]!r} as offset or length of its external data; export the model again")
    return int(text)


def _name(tensor: Any) -> str:
    return f"tensor {tensor.name[:80]!r}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- what it takes and gives -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    """Inputs and outputs, and how they batch. `batch`: 0 is a free batch in dimension 0 of all, n a fixed one, None no batch they share.

    `dims`: input -> its sizes, a name (or "") where free; `quantized`: holds QuantizeLinear nodes.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    dims: dict[str, tuple[int | str, ...]]
    batch: int | None
    batch_dim: str
    quantized: bool

    @property
    def free_dims(self) -> set[str]:
        """Names of the free dimensions beside the batch."""
        return {size for sizes in self.dims.values() for size in sizes if isinstance(size, str)} - {self.batch_dim, ""}


def face_of(model: Any) -> Face:
    """What a model of `read_onnx` takes and gives. Raises UserError for inputs or outputs that are no tensors of numbers."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in constants}
    dims = {name: _dims(value) for name, value in inputs.items()}
    outputs = {value.name: _dims(value) for value in model.graph.output}
    batch, name = _batch(list(dims.values()), list(outputs.values()))
    quantized = any(node.op_type in ("QuantizeLinear", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear") for node in model.graph.node)
    return Face(
        tuple(_tensor(value) for value in inputs.values()), tuple(_tensor(value) for value in model.graph.output), dims, batch, name, quantized
    )


def _dims(value: Any) -> tuple[int | str, ...]:
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param for dim in value.type.tensor_type.shape.dim)


def _tensor(value: Any) -> Tensor:
    from onnx import helper

    kind = value.type.tensor_type.elem_type
    if value.type.WhichOneof("value") != "tensor_type" or kind in (0, 8, 16):  # undefined, string, bfloat16: numpy has none of them
        raise UserError(f"{value.name}: is no tensor of numbers that numpy has; give and take floats, integers or booleans")
    return Tensor(value.name, helper.tensor_dtype_to_np_dtype(kind).name, tuple(size if isinstance(size, int) else -1 for size in _dims(value)))


def _batch(inputs: list[tuple[int | str, ...]], outputs: list[tuple[int | str, ...]]) -> tuple[int | None, str]:
    """Free (0) when the first dimension of every input is the same free one, and free in every output; fixed when it is one number in all."""
    firsts = {sizes[:1] for sizes in inputs}
    ends = {sizes[:1] for sizes in outputs}
    if len(firsts) != 1 or not inputs or not next(iter(firsts)):
        return None, ""
    (first,) = next(iter(firsts))
    if isinstance(first, int):
        return (first if ends == {(first,)} else None), ""
    elsewhere = any(size == first and first for sizes in inputs for size in sizes[1:])
    free = all(end and isinstance(end[0], str) for end in ends)
    return (0, first) if free and not elsewhere else (None, "")
