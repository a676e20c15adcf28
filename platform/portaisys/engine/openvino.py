"""OpenVINO on the CPU: often its fastest engine, and the only one with bf16 arithmetic.

Takes the artifact's files as they are, the signed int8 one too. What is built is OpenVINO's own compiled form, which
loads without compiling; it is good for this version and this kind of CPU, both of which are in the cache's key. Tuned for
throughput, a thread is a stream of its own and a batch is shared out among them: they need not wait for one another.
"""

from __future__ import annotations

import importlib
import queue
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys.artifact import write_bytes
from portaisys.engine import Arrays, Options, Tensor, check_feeds
from portaisys.engine.cpu import device
from portaisys.engine.onnx_file import read_for
from portaisys.spec import UserError

PRECISIONS = ("fp32", "bf16", "int8")
# What is not int8 in an int8 file is computed in fp32, unless bf16 was asked for beside it and the CPU has it: `Options.rest`.
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


def version() -> str:
    """Library and version. Raises UserError naming the extra."""
    return f"openvino {_library().__version__}"


def build(onnx: Path, options: Options, out: Path, kept: Path | None = None) -> list[str]:
    """Compile for this CPU and write the compiled form. Raises UserError when OpenVINO or this CPU refuses."""
    openvino = _library()
    read_for(onnx, "int8" if options.precision == "int8" else "fp32")  # bf16 is a hint here
    core = openvino.Core()
    _refuse_without_bf16(core, options.precision)
    try:
        compiled = core.compile_model(core.read_model(onnx), "CPU", _config(core, options))
        write_bytes(out, compiled.export_model().getvalue())
    except RuntimeError as error:
        raise UserError(f"{onnx}: OpenVINO cannot compile it: {_reason(error)}") from error
    return []


def load(built: Path, options: Options, kept: Path | None = None) -> OpenVinoEngine:
    """Open a compiled file. Raises UserError when OpenVINO refuses it."""
    core = _library().Core()
    _refuse_without_bf16(core, options.precision)
    try:
        return OpenVinoEngine(core.import_model(built.read_bytes(), "CPU", _config(core, options)), options.precision, _streams(options), options.slots)
    except RuntimeError as error:
        raise UserError(f"{built}: OpenVINO cannot open it: {_reason(error)}") from error


class OpenVinoEngine:
    """A compiled model behind the Engine interface. `slots`: calls at once, each with a request a stream."""

    backend = "openvino"

    def __init__(self, compiled: Any, precision: str, streams: int = 1, slots: int = 1) -> None:
        self.precision, self.device = precision, device()
        self.inputs = tuple(_tensor(port) for port in compiled.inputs)
        self.outputs = tuple(_tensor(port) for port in compiled.outputs)
        shared = all(tensor.shape[:1] == (-1,) for tensor in (*self.inputs, *self.outputs))
        self._lanes: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        for _ in range(slots):
            self._lanes.put([compiled.create_infer_request() for _ in range(streams if shared else 1)])

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs for a batch of inputs. Raises UserError for wrong names, types or shapes."""
        rows = check_feeds(self.inputs, feeds)
        requests = self._lanes.get()
        try:
            return self._answered(requests, feeds, rows)
        finally:
            self._lanes.put(requests)

    def _answered(self, requests: list[Any], feeds: Arrays, rows: int) -> dict[str, NDArray[Any]]:
        if len(requests) == 1 or rows == 1:
            found = requests[0].infer(dict(feeds), share_inputs=True)
            return {tensor.name: found[index] for index, tensor in enumerate(self.outputs)}
        parts = _started(requests, feeds, rows)
        for request in parts:
            request.wait()
        return {tensor.name: np.concatenate([request.get_output_tensor(index).data for request in parts]) for index, tensor in enumerate(self.outputs)}

    def close(self) -> None:
        """Free the requests and their memory."""
        while not self._lanes.empty():
            self._lanes.get()


def _started(requests: list[Any], feeds: Arrays, rows: int) -> list[Any]:
    """Requests under way, each with its share of the rows."""
    ends = [rows * part // len(requests) for part in range(len(requests) + 1)]
    shares = [(request, slice(*ends[part : part + 2])) for part, request in enumerate(requests) if ends[part] < ends[part + 1]]
    for request, share in shares:
        request.start_async({name: array[share] for name, array in feeds.items()}, share_inputs=True)
    return [request for request, _ in shares]


def _library() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError:
        raise UserError("engine.backend: OpenVINO is not installed; pip install 'portaisys[openvino]'") from None


def _config(core: Any, options: Options) -> dict[str, Any]:
    hint = _HINTS["bf16" if options.precision == "int8" and options.rest == "bf16" and _has_bf16(core) else options.precision]
    # Replicas share cores: threads as given, none of them pinned to a core that another replica's may be pinned to as well.
    return {
        "INFERENCE_NUM_THREADS": options.threads * options.slots, "NUM_STREAMS": _streams(options) * options.slots, "PERFORMANCE_HINT": options.hint.upper(), "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": hint,
    }  # fmt: skip


def _streams(options: Options) -> int:
    return options.threads if options.hint == "throughput" else 1


def _has_bf16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _refuse_without_bf16(core: Any, precision: str) -> None:
    """OpenVINO takes the hint on any CPU and computes in fp32 without a word."""
    if precision == "bf16" and not _has_bf16(core):
        raise UserError(f"engine.precisions: 'bf16' has no arithmetic on this CPU ({device()}): it needs AVX-512 BF16 or AMX; leave bf16 out")


def _tensor(port: Any) -> Tensor:
    shape = tuple(size.get_length() if size.is_static else -1 for size in port.get_partial_shape())
    # A compiled tensor carries the names of all that was folded into it; its node has the file's. An output's ends in its port.
    name = port.get_node().get_friendly_name().partition("/sink_port_")[0]
    return Tensor(name, port.get_element_type().to_dtype().name, shape)


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's chain of checks: the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
