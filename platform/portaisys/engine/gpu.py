"""Runs a TensorRT plan: a pool of slots, each with a stream, static buffers and CUDA graphs of the usual batch sizes.

A plan is shared by all who open it in this process; an execution context is not thread-safe (TensorRT #1300, #2040), so a batch
takes a slot for itself. Batches are padded to 1, 2, 4, 8, ... so that a graph of each can be captured once and launched ever after.
Knows nothing of how plans are built; what it asks of CUDA is in cuda.py.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys.artifact import write_bytes
from portaisys.engine import Arrays, CannotExecute, Options, Tensor, check_feeds
from portaisys.engine.cuda import Cuda
from portaisys.spec import UserError

logger = logging.getLogger(__name__)

SLOT_WAIT_S = 60.0  # longer than any batch; beyond it the card hangs
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Plan:
    """A deserialized plan, shared by every engine of it in this process. `most`: the largest shape of every input and output.

    `kept`: the file in which RTX keeps kernels it has compiled here; `notes`: fall-backs.
    """

    trt: Any
    runtime: Any  # must outlive the plan
    engine: Any
    device: str
    errors: Callable[[], str]
    kept: Path | None = None
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    most: dict[str, tuple[int, ...]] = field(default_factory=dict)
    config: Any = None
    kernels: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def weights_bytes(self) -> int:
        """What its weights take on the card, once for all slots."""
        return int(self.engine.get_engine_stat(self.trt.EngineStat.TOTAL_WEIGHTS_SIZE))

    @property
    def scratch_bytes(self) -> int:
        """What one batch in flight takes for what is between layers."""
        return int(self.engine.device_memory_size_v2)

    @property
    def captures_itself(self) -> bool:
        """RTX captures graphs by itself, and compiles kernels in between: capturing around it would be in its way."""
        return hasattr(self.config, "cuda_graph_strategy")


def describe(plan: Plan, cuda_graphs: bool) -> Plan:
    """Read names, types and shapes off the plan and settle how its contexts are made. Raises CannotExecute for outputs of unknown size."""
    trt, engine = plan.trt, plan.engine
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = {mode: tuple(_tensor(trt, engine, name) for name in names if engine.get_tensor_mode(name) == mode) for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)}
    plan.inputs, plan.outputs = tensors[trt.TensorIOMode.INPUT], tensors[trt.TensorIOMode.OUTPUT]
    plan.config = _config(plan, cuda_graphs)
    plan.most = {tensor.name: tuple(engine.get_tensor_profile_shape(tensor.name, 0)[2]) for tensor in plan.inputs}
    context = new_context(plan)
    plan.most |= output_shapes(plan, context, plan.most)
    return plan


def _tensor(trt: Any, engine: Any, name: str) -> Tensor:
    return Tensor(name, np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name, tuple(engine.get_tensor_shape(name)))


def _config(plan: Plan, cuda_graphs: bool) -> Any:
    """Contexts are given their scratch memory: those of one slot never run at the same time and share it."""
    trt, config = plan.trt, plan.engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if hasattr(config, "cuda_graph_strategy"):
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if cuda_graphs else trt.CudaGraphStrategy.DISABLED
        # Kernels of a new shape are compiled where it is first met, which is in `warm`, and not behind a client's back.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        plan.kernels = config.create_runtime_cache()
        if plan.kept is not None and plan.kept.exists() and not plan.kernels.deserialize(plan.kept.read_bytes()):
            plan.notes.append("the kernels kept from earlier runs are of another version or damaged, and are compiled again")
        config.set_runtime_cache(plan.kernels)
    return config


def keep_kernels(plan: Plan) -> None:
    """Write what RTX compiled, for the next process. A folder that cannot be written costs the next start time, no more."""
    if plan.kernels is None or plan.kept is None:
        return
    try:
        plan.kept.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(plan.kept, bytes(plan.kernels.serialize()))
    except OSError as error:
        logger.warning("%s: compiled kernels cannot be kept (%s)", plan.kept, error.strerror)


def new_context(plan: Plan) -> Any:
    """Raises CannotExecute when the card has no room for one more."""
    context = plan.engine.create_execution_context(plan.config)
    if context is None:
        raise CannotExecute(f"built but not run: no execution context (GPU memory?): {plan.errors()}")
    return context


def output_shapes(plan: Plan, context: Any, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs at these of the inputs, which are set. Raises CannotExecute when they depend on what the inputs hold."""
    for name, shape in shapes.items():
        if not context.set_input_shape(name, shape):
            raise RuntimeError(f"TensorRT could not set the shape of {name} to {list(shape)}: {plan.errors()}")
    found = {tensor.name: tuple(context.get_tensor_shape(tensor.name)) for tensor in plan.outputs}
    for name, shape in found.items():
        if min(shape, default=0) < 0:
            raise CannotExecute(f"built but not run: the size of output {name} {list(shape)} depends on what the inputs hold; give it a fixed size (pad it) or use another backend")
    return found


class Slot:
    """One batch in flight: a stream, buffers at the largest shapes, pinned on the host's side, and a graph a bucket."""

    def __init__(self, plan: Plan, cuda: Cuda) -> None:
        self._plan, self._cuda = plan, cuda
        self._stream = cuda.stream()
        sizes = {tensor.name: _bytes(plan.most[tensor.name], tensor.dtype) for tensor in (*plan.inputs, *plan.outputs)}
        self._host = {name: cuda.pinned(size) for name, size in sizes.items()}
        self._card = {name: cuda.card(size) for name, size in sizes.items()}
        self._scratch = cuda.card(plan.scratch_bytes) if plan.scratch_bytes else None
        self.memory_bytes = sum(sizes.values()) + plan.scratch_bytes
        self._context = self._bound()
        self._graphs: dict[int, tuple[Callable[[], None], Shapes]] = {}
        self._kept: list[Any] = []  # contexts that graphs were captured from

    def run(self, feeds: Arrays, rows: int, bucket: int) -> dict[str, NDArray[Any]]:
        """Outputs for `rows`, computed as `bucket` of them. Raises RuntimeError when TensorRT or CUDA fails."""
        shapes = {tensor.name: _at(tensor, feeds[tensor.name].shape, bucket) for tensor in self._plan.inputs}
        for tensor in self._plan.inputs:
            _fill(self._view(tensor, shapes[tensor.name]), feeds[tensor.name])
        if bucket in self._graphs:
            launch, made = self._graphs[bucket]
            with self._cuda.on(self._stream):
                launch()
        else:
            made = self._work(self._context, shapes)
        self._cuda.wait(self._stream)
        # Copies: the buffers are the next batch's.
        return {tensor.name: self._view(tensor, made[tensor.name])[: rows if rows != bucket else None].copy() for tensor in self._plan.outputs}

    def warm(self, bucket: int) -> None:
        """One run at this batch with whatever the buffers hold: the first pays for kernels and memory."""
        self._work(self._context, self._shapes(bucket))
        self._cuda.wait(self._stream)

    def capture(self, bucket: int) -> None:
        """Make a graph of a batch of this size, copies included. Raises RuntimeError when it cannot be captured."""
        context, shapes = self._bound(), self._shapes(bucket)
        made = self._work(context, shapes)  # the first enqueue after a change of shape must be a plain one (TensorRT #2603, #3798)
        self._cuda.wait(self._stream)
        launch = self._cuda.capture(self._stream, lambda: self._enqueue(context, {**shapes, **made}))
        self._graphs[bucket] = launch, made
        self._kept.append(context)

    def close(self) -> None:
        """Wait for what runs, then free everything in the order that TensorRT wants: graphs, contexts, memory."""
        self._cuda.wait(self._stream)
        self._graphs.clear()
        self._kept.clear()
        self._context = self._scratch = None
        self._card.clear()
        self._host.clear()

    def _bound(self) -> Any:
        """A context on this slot's buffers."""
        context = new_context(self._plan)
        if self._scratch is not None:
            context.set_device_memory(self._scratch.data_ptr(), self._plan.scratch_bytes)
        for name, buffer in self._card.items():
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise RuntimeError(f"TensorRT could not bind {name}: {self._plan.errors()}")
        return context

    def _shapes(self, bucket: int) -> dict[str, tuple[int, ...]]:
        return {tensor.name: _at(tensor, self._plan.most[tensor.name], bucket) for tensor in self._plan.inputs}

    def _work(self, context: Any, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Everything a batch is, on the stream; returns the outputs' shapes."""
        made = output_shapes(self._plan, context, shapes)
        with self._cuda.on(self._stream):
            self._enqueue(context, {**shapes, **made})
        return made

    def _enqueue(self, context: Any, shapes: Shapes) -> None:
        for tensor in self._plan.inputs:
            size = _bytes(shapes[tensor.name], tensor.dtype)
            self._cuda.copy(self._card[tensor.name][:size], self._host[tensor.name][:size])
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError(f"TensorRT could not execute: {self._plan.errors()}")
        for tensor in self._plan.outputs:
            size = _bytes(shapes[tensor.name], tensor.dtype)
            self._cuda.copy(self._host[tensor.name][:size], self._card[tensor.name][:size])

    def _view(self, tensor: Tensor, shape: tuple[int, ...]) -> NDArray[Any]:
        """The pinned buffer of a tensor as an array."""
        flat: NDArray[Any] = self._host[tensor.name].numpy()[: _bytes(shape, tensor.dtype)]
        return flat.view(tensor.dtype).reshape(shape)


def _bytes(shape: Sequence[int], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _at(tensor: Tensor, shape: Sequence[int], rows: int) -> tuple[int, ...]:
    """The shape with so many rows, where they are free."""
    return (rows, *shape[1:]) if tensor.shape[:1] == (-1,) else tuple(shape)


def _fill(buffer: NDArray[Any], array: NDArray[Any]) -> None:
    """The rows, and the first again as padding: real numbers, whatever the model does with them."""
    if buffer.shape == array.shape:
        buffer[...] = array
        return
    buffer[: len(array)] = array
    buffer[len(array) :] = array[:1]


def buckets_of(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to the largest, which is one whatever it is."""
    return (*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest)


class GpuEngine:
    """A plan behind the Engine interface. Up to `slots` batches run at once; `memory_bytes`: what it holds on the card; `notes`: fall-backs."""

    backend = "tensorrt"

    def __init__(self, plan: Plan, cuda: Cuda, options: Options, release: Callable[[], None] = lambda: None) -> None:
        self.precision, self.device, self.inputs, self.outputs = options.precision, plan.device, plan.inputs, plan.outputs
        self._plan, self._cuda, self._release = plan, cuda, release
        self._slots = [Slot(plan, cuda) for _ in range(options.slots)]
        self._free: queue.LifoQueue[Slot] = queue.LifoQueue()  # the one used last: its buffers are in the caches
        self._buckets, self.notes = self._prepared(options)
        for slot in self._slots:
            self._free.put(slot)
        self._closing = threading.Lock()

    @property
    def slots(self) -> int:
        """How many batches run at once."""
        return len(self._slots)

    @property
    def memory_bytes(self) -> int:
        """Weights, buffers and scratch on the card; not what CUDA itself takes, nor graphs."""
        return self._plan.weights_bytes + sum(slot.memory_bytes for slot in self._slots)

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs for a batch of inputs, from any thread.

        Raises UserError for wrong feeds or sizes outside the profile, TimeoutError when no slot comes free, RuntimeError when the card fails.
        """
        rows = check_feeds(self.inputs, feeds)
        self._check_profile(feeds)
        bucket = next((size for size in self._buckets if size >= rows), rows)
        slot = self._take()
        try:
            return slot.run(feeds, rows, bucket)
        finally:
            self._free.put(slot)

    def close(self) -> None:
        """Wait for what runs and free the card's memory; a second call does nothing."""
        with self._closing:
            slots, self._slots = self._slots, []
        for _ in slots:
            self._take().close()
        if slots:
            keep_kernels(self._plan)
            self._release()

    def _take(self) -> Slot:
        try:
            return self._free.get(timeout=SLOT_WAIT_S)
        except queue.Empty:
            raise TimeoutError(f"no slot of this engine came free within {SLOT_WAIT_S:g} s: the card hangs, or engine.slots is too small for the load") from None

    def _check_profile(self, feeds: Arrays) -> None:
        for tensor in self.inputs:
            shape, most = feeds[tensor.name].shape, self._plan.most[tensor.name]
            if any(size > limit for size, limit in zip(shape, most, strict=True)):
                raise UserError(f"inputs: {tensor.name} is {list(shape)}, but this engine was built for at most {list(most)} (export.max_batch, --max-batch, --dim)")

    def _prepared(self, options: Options) -> tuple[tuple[int, ...], list[str]]:
        """The sizes that batches are padded to, warm and with graphs where they can be; and what could not be."""
        notes = [*self._plan.notes]
        if not options.cuda_graphs:
            return (), notes
        buckets = self._graphed()
        if not buckets:
            return (), [*notes, "no CUDA graphs: for them nothing but the batch in dimension 0 may vary"]
        for slot in self._slots:
            for bucket in buckets:
                self._ready(slot, bucket, notes)
        keep_kernels(self._plan)
        return buckets, list(dict.fromkeys(notes))

    def _graphed(self) -> tuple[int, ...]:
        """Batch sizes for a graph each; none where anything else varies, since there is no end of shapes then."""
        shapes = [tensor.shape for tensor in (*self.inputs, *self.outputs)]
        largest = self._plan.most[self.inputs[0].name][:1]
        if not any(-1 in shape for shape in shapes):
            return largest
        return buckets_of(*largest) if all(shape[:1] == (-1,) and -1 not in shape[1:] for shape in shapes) else ()

    def _ready(self, slot: Slot, bucket: int, notes: list[str]) -> None:
        if self._plan.captures_itself:
            slot.warm(bucket)
            return
        try:
            slot.capture(bucket)
        except RuntimeError as error:
            notes.append(f"batches of {bucket} run without a CUDA graph: {str(error).splitlines()[0]}")
            logger.warning("%s", notes[-1])
