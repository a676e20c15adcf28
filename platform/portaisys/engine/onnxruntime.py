"""ONNX Runtime: the default engine, and the reference other engines are compared with. On the CPU, or a GPU where its build has one.

Knows how x86 wants its integers: ORT has fast kernels for unsigned activations only, while the artifact is signed, as
TensorRT wants it. So the built int8 file differs from the artifact, and must go to no other engine. Knows no accuracy.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from portaisys.artifact import write_bytes
from portaisys.engine import Arrays, Options, Tensor, check_feeds, cpu
from portaisys.engine.cuda import driver
from portaisys.engine.onnx_file import quantized_parts, read_for
from portaisys.engine.verify import answers
from portaisys.spec import UserError

PRECISIONS = ("fp32", "int8")

_X86 = ("x86_64", "AMD64")
_DTYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(int16)": "int16", "tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32", "tensor(uint64)": "uint64", "tensor(bool)": "bool",
}  # fmt: skip


# Providers by their short name, each with those it leaves operators to.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


def version() -> str:
    """Library and version."""
    return f"onnxruntime {onnxruntime.__version__}"


def device() -> str:
    """The kind of CPU, "cpu-avx2"; with the GPU beside it, "cpu-avx2+sm_90", where this build of ONNX Runtime can use it."""
    return cpu.device() if provider("auto") == "cpu" else f"{cpu.device()}+{(driver() or ('',))[0]}"


def provider(asked: str) -> str:
    """The short name of the provider that `asked` comes to here: "auto" is CUDA where this build and machine have it, else the CPU.

    Raises UserError for one that this build has not.
    """
    there = onnxruntime.get_available_providers()
    if asked == "auto":
        return "cuda" if PROVIDERS["cuda"][0] in there and driver() else "cpu"
    if PROVIDERS[asked][0] not in there:
        raise UserError(f"engine.provider: {asked!r} needs a build of ONNX Runtime that has it (pip install onnxruntime-gpu in place of onnxruntime); this one has {', '.join(there)}")
    return asked


def build(onnx: Path, options: Options, out: Path, kept: Path | None = None) -> list[str]:
    """Write the file this CPU runs best and open it once. Returns notes. Raises UserError when ORT refuses it."""
    model = read_for(onnx, options.precision)
    notes = []
    if options.precision == "int8" and platform.machine() in _X86 and provider(options.provider) == "cpu":
        unsigned = make_unsigned(model.graph)
        notes = [f"{unsigned} int8 activations became uint8, which ONNX Runtime is fast at on x86" if unsigned else "weights alone are int8: ONNX Runtime makes them floats when it opens the file"]
        write_bytes(out, model.SerializeToString(deterministic=True))
    else:
        write_bytes(out, onnx.read_bytes())
    _session(out, options, onnx, kept)
    return notes


def load(built: Path, options: Options, kept: Path | None = None) -> OrtEngine:
    """Open a built file. Raises UserError when ORT refuses it, or the provider that was asked for."""
    return OrtEngine(_session(built, options, built, kept), options.precision, bound=provider(options.provider) != "cpu")


class OrtEngine:
    """An ORT session behind the Engine interface. `bound`: inputs and outputs by IO binding, which a GPU wants; on a CPU it saves nothing (docs/log.md)."""

    backend = "onnxruntime"

    def __init__(self, session: Any, precision: str, *, bound: bool = False) -> None:
        self._session, self._bound = session, bound
        self.precision, self.device = precision, device()
        self.inputs = tuple(_tensor(node) for node in session.get_inputs())
        self.outputs = tuple(_tensor(node) for node in session.get_outputs())

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs for a batch of inputs. Raises UserError for wrong names, types or shapes."""
        check_feeds(self.inputs, feeds)
        names = [tensor.name for tensor in self.outputs]
        return dict(zip(names, self._run_bound(names, feeds) if self._bound else self._session.run(names, dict(feeds)), strict=True))

    def _run_bound(self, names: Sequence[str], feeds: Arrays) -> Any:
        """One copy to the card for each input and one back for each output, however many operators ran on either side."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()

    def close(self) -> None:
        """Free the session."""
        self._session = None


def reference(onnx: Path, feeds: Arrays, batch: int) -> dict[str, NDArray[Any]]:
    """What the file itself says: answers with every optimisation off, `batch` rows at a time (0: one call). Raises UserError when ORT refuses it."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(onnx), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"{onnx}: ONNX Runtime cannot open it: {str(error).strip()}") from error
    return answers(OrtEngine(session, "fp32"), feeds, batch)


def _session(path: Path, options: Options, blame: Path, kept: Path | None) -> Any:
    chosen = provider(options.provider)
    given = [(name, _provider_options(name, kept)) for name in PROVIDERS[chosen]]
    try:
        settings = _settings(options)
        wrong = _for_quantized(path, settings) if options.precision == "int8" else []
        session = onnxruntime.InferenceSession(str(path), settings, providers=given, disabled_optimizers=wrong)
    except Exception as error:  # ORT's errors share no base class but Exception
        raise UserError(f"{blame}: ONNX Runtime cannot open it: {str(error).strip()}") from error
    if session.get_providers()[0] != PROVIDERS[chosen][0]:  # it goes on with the CPU when a library of the GPU's does not load
        raise UserError(f"engine.provider: {PROVIDERS[chosen][0]} did not start here (its CUDA libraries?); put them right, or set engine.provider=cpu")
    return session


def _for_quantized(path: Path, settings: Any) -> list[str]:
    """Set what a quantized file needs; returns the optimizers that would give it wrong answers."""
    activations, low = quantized_parts(path)
    if not activations:  # weights alone: without this they would be turned into floats at every call (1.6 to 1.9 x the time of fp32), with it once
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    # It quantizes biases by the product of two fp16 scales, which is rounded away (docs/log.md).
    return ["WeightBiasQuantization"] if low else []


def _settings(options: Options) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = options.threads, 1
    settings.log_severity_level = 3
    # One plan of memory is kept for each shape that was ever run; without, mixed batches take a fifth less and no more time (docs/log.md).
    settings.enable_mem_pattern = False
    # Replicas share cores: a thread that spins while it waits takes its neighbour's.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # x86 without VNNI adds pairs of u8 x s8 products in 16 bits, which saturate when a weight is beyond +-64. Measured on
    # such a machine: error 8.8 % instead of 3.3 %. With this ORT makes just those weights unsigned, just on those machines:
    # exact, about 20 % slower. Quantize.reduce_range avoids it at the source.
    settings.add_session_config_entry("session.x64quantprecision", "1")
    return settings


def _provider_options(name: str, kept: Path | None) -> dict[str, str]:
    if name == "TensorrtExecutionProvider" and kept is not None:
        return {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(kept / "onnxruntime-tensorrt")}
    # Memory is asked for as it is needed: the default doubles it each time, on a card that others use too.
    return {"arena_extend_strategy": "kSameAsRequested"} if name == "CUDAExecutionProvider" else {}


def _tensor(node: Any) -> Tensor:
    if node.type not in _DTYPES:
        raise UserError(f"{node.name}: is a {node.type}; engines take and give {', '.join(sorted(set(_DTYPES.values())))}")
    return Tensor(node.name, _DTYPES[node.type], tuple(size if isinstance(size, int) else -1 for size in node.shape))


# --- signed to unsigned activations ------------------------------------------------------------------------------

# The value is never negative after these ...
_POSITIVE = {"Relu", "Softmax", "Sigmoid"}
# ... nor after these, when it was not before.
_KEEPS_SIGN = {"MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}
_ZERO, _MIDDLE = "portaisys.uint8_0", "portaisys.uint8_128"


def make_unsigned(graph: Any) -> int:
    """Give the int8 activations of a Q/DQ graph uint8 in their place, at the same scale; returns how many. Changes `graph`.

    Where a value is never negative, zero-point 0 (and 128..255, unused before, keep what would have been clipped);
    elsewhere q becomes q + 128 at zero-point 128, which stands for the same number.
    """
    made_by = {name: node for node in graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    pairs = list(_signed_pairs(graph, tensors))
    for quantize, dequantizes in pairs:
        zero_point = _ZERO if _never_negative(quantize.input[0], made_by) else _MIDDLE
        for node in (quantize, *dequantizes):
            node.input[2] = zero_point
    _tidy(graph, {quantize.output[0] for quantize, _ in pairs})
    return len(pairs)


def _signed_pairs(graph: Any, tensors: dict[str, Any]) -> Iterator[tuple[Any, list[Any]]]:
    """QuantizeLinear nodes at int8 zero-point 0 with their DequantizeLinear nodes, when nothing else reads them."""
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) == 3 and _is_int8_zero(tensors.get(node.input[2])):
            readers = [reader for reader in graph.node if node.output[0] in reader.input]
            if node.output[0] not in outputs and all(reader.op_type == "DequantizeLinear" for reader in readers):
                yield node, readers


def _is_int8_zero(tensor: Any) -> bool:
    value = None if tensor is None else numpy_helper.to_array(tensor)
    return value is not None and value.dtype == np.int8 and not value.any()


def _never_negative(name: str, made_by: dict[str, Any]) -> bool:
    node = made_by.get(name)
    while node is not None and node.op_type in _KEEPS_SIGN:
        node = made_by.get(node.input[0])
    return node is not None and node.op_type in _POSITIVE


def _tidy(graph: Any, changed: set[str]) -> None:
    """Add the new zero-points, drop the old ones and the stale types."""
    graph.initializer.extend([numpy_helper.from_array(np.array(value, np.uint8), name) for value, name in ((0, _ZERO), (128, _MIDDLE))])
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    _keep(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read])
    _keep(graph.value_info, [value for value in graph.value_info if value.name not in changed])


def _keep(values: Any, kept: list[Any]) -> None:
    del values[:]
    values.extend(kept)
