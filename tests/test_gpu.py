"""The runtime's own logic, slots, buckets, padding, time-outs and errors, against a stand-in of the few calls it makes of TensorRT and CUDA.

The stand-in computes y = 2 x + 1 in the memory it was given addresses of, on torch's CPU tensors, so a wrong shape, offset or buffer
gives a wrong answer. It says nothing of TensorRT: on a GPU tests/test_engine.py does (marker gpu).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from portaisys.engine import CannotExecute, Options, tensorrt
from portaisys.engine import gpu as running
from portaisys.engine.gpu import GpuEngine, Plan, buckets_of, describe
from portaisys.spec import UserError

WIDTH = 3


class Card:
    """Stands in for Cuda: both memories are the host's, a stream runs at once, a graph is its work done again."""

    def __init__(self, uncapturable=()):
        self.uncapturable, self.captured, self.launches = uncapturable, 0, 0

    def stream(self):
        return SimpleNamespace(cuda_stream=7)

    def on(self, stream):
        return contextlib.nullcontext()

    def pinned(self, size):
        return torch.zeros(size, dtype=torch.uint8)

    card = pinned

    def copy(self, to, source):
        to.copy_(source)

    def wait(self, stream):
        pass

    def capture(self, stream, work):
        self.captured += 1
        if self.captured in self.uncapturable:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def launch():
            self.launches += 1
            work()

        return launch


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.scratch, self.busy = engine, {}, {}, None, threading.Lock()

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return shape[0] <= self.engine.most

    def get_tensor_shape(self, name):
        return self.shapes["x"] if not self.engine.odd_output else (-1, WIDTH)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_device_memory(self, address, size):
        self.scratch = size

    def execute_async_v3(self, stream):
        assert self.busy.acquire(blocking=False), "two threads in one context"
        with contextlib.ExitStack() as stack:
            stack.callback(self.busy.release)
            self.engine.on_execute()
            self.engine.ran.append(self.shapes["x"])
            size = int(np.prod(self.shapes["x"]))
            x, y = (np.frombuffer((ctypes.c_float * size).from_address(self.addresses[name]), np.float32) for name in ("x", "y"))
            y[:] = 2 * x + 1
        return not self.engine.fails


class CudaEngine:
    """Stands in for ICudaEngine: x [batch, 3] -> y [batch, 3], both float32."""

    num_io_tensors, device_memory_size_v2 = 2, 4096

    def __init__(self, shape=(-1, WIDTH), most=8, odd_output=False, rtx=False):
        self.shape, self.most, self.odd_output, self.rtx, self.fails, self.ran, self.on_execute = shape, most, odd_output, rtx, False, [], lambda: None

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_mode(self, name):
        return {"x": "in", "y": "out"}[name]

    def get_tensor_dtype(self, name):
        return "f4"

    def get_tensor_shape(self, name):
        return self.shape

    def get_tensor_profile_shape(self, name, index):
        return [[1 if size == -1 else size for size in self.shape]] * 2 + [[self.most if size == -1 else size for size in self.shape]]

    def get_engine_stat(self, stat):
        return 1000

    def create_runtime_config(self):
        kernels = SimpleNamespace(serialize=lambda: b"kernels", deserialize=lambda data: data == b"kernels")
        only_rtx = {"cuda_graph_strategy": None, "create_runtime_cache": lambda: kernels, "set_runtime_cache": lambda cache: True} if self.rtx else {}
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None, **only_rtx)

    def create_execution_context(self, config):
        return Context(self)


def names(*values):
    return SimpleNamespace(**{value: value for value in values})


TRT = SimpleNamespace(
    __name__="tensorrt", __version__="10.16", TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"), nptype=lambda dtype: np.dtype(dtype).type,
    ExecutionContextAllocationStrategy=names("USER_MANAGED"), EngineStat=names("TOTAL_WEIGHTS_SIZE"), CudaGraphStrategy=names("WHOLE_GRAPH_CAPTURE", "DISABLED"),
    DynamicShapesKernelSpecializationStrategy=names("EAGER"), NetworkDefinitionCreationFlag=None,
)  # fmt: skip


def opened(engine=None, card=None, kept=None, **options):
    chosen = Options(**options)
    plan = describe(Plan(TRT, None, engine or CudaEngine(), "sm_90", lambda: "the card said no", kept), chosen.cuda_graphs)
    return GpuEngine(plan, card or Card(), chosen)


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def test_answers_are_right_at_every_batch_in_any_order_with_and_without_graphs():
    for graphs in (True, False):
        engine = opened(cuda_graphs=graphs)
        for batch in (8, 1, 3, 7, 2, 8, 5, 1):
            x = rows(batch, seed=batch)
            np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x + 1)


def test_batches_are_padded_to_the_next_bucket_and_launched_as_its_graph():
    inner, card = CudaEngine(most=12), Card()
    engine = opened(inner, card)
    inner.ran.clear()
    for batch in (1, 3, 8, 9, 12):
        assert engine.run({"x": rows(batch)})["y"].shape == (batch, WIDTH)
    assert [shape[0] for shape in inner.ran] == [1, 4, 8, 12, 12] and card.launches == 5


def test_without_graphs_nothing_is_padded():
    inner = CudaEngine()
    engine = opened(inner, cuda_graphs=False)
    inner.ran.clear()
    engine.run({"x": rows(3)})
    assert inner.ran == [(3, WIDTH)]


def test_what_pads_a_batch_is_its_own_first_row_and_never_an_earlier_request():
    engine = opened()
    engine.run({"x": np.full((4, WIDTH), np.nan, np.float32)})
    x = rows(3)
    engine.run({"x": x})
    (slot,) = engine._slots
    np.testing.assert_array_equal(slot._view(engine.inputs[0], (4, WIDTH)), np.concatenate([x, x[:1]]))


def test_an_answer_is_not_overwritten_by_the_next_batch():
    engine = opened()
    first = engine.run({"x": rows(2, 1)})["y"]
    copy = first.copy()
    engine.run({"x": rows(2, 2)})
    np.testing.assert_array_equal(first, copy)


def test_as_many_batches_run_at_once_as_there_are_slots_and_no_context_is_shared():
    inner = CudaEngine()
    engine = opened(inner, slots=2)
    meet = threading.Barrier(2, timeout=10)
    inner.on_execute = meet.wait  # passes only when two batches are in flight together
    answers = {}

    def ask(number):
        answers[number] = engine.run({"x": rows(2, number)})["y"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert engine.slots == 2 and sorted(answers) == list(range(6))
    for number, answer in answers.items():
        np.testing.assert_array_equal(answer, 2 * rows(2, number) + 1)


def test_a_batch_that_finds_no_free_slot_says_so_in_time_and_the_next_is_served(monkeypatch):
    monkeypatch.setattr(running, "SLOT_WAIT_S", 0.05)
    inner = CudaEngine()
    engine, inside, go = opened(inner), threading.Event(), threading.Event()
    inner.on_execute = lambda: (inside.set(), go.wait(10))
    thread = threading.Thread(target=lambda: engine.run({"x": rows(1)}))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(TimeoutError, match=r"no slot of this engine came free within 0\.05 s"):
        engine.run({"x": rows(1)})
    go.set()
    thread.join(10)
    np.testing.assert_array_equal(engine.run({"x": rows(1)})["y"], 2 * rows(1) + 1)


def test_a_batch_that_fails_says_what_tensorrt_said_and_gives_its_slot_back():
    inner = CudaEngine()
    engine = opened(inner)
    inner.fails = True
    with pytest.raises(RuntimeError, match="TensorRT could not execute: the card said no"):
        engine.run({"x": rows(1)})
    inner.fails = False
    np.testing.assert_array_equal(engine.run({"x": rows(1)})["y"], 2 * rows(1) + 1)


def test_a_batch_size_that_cannot_be_captured_runs_plainly_and_is_named():
    inner, card = CudaEngine(), Card(uncapturable=(2,))
    engine = opened(inner, card)
    assert engine.notes == ["batches of 2 run without a CUDA graph: operation not permitted when stream is capturing"]
    for batch in (1, 2, 4):
        np.testing.assert_array_equal(engine.run({"x": rows(batch)})["y"], 2 * rows(batch) + 1)
    assert card.launches == 2


def test_other_free_dimensions_and_fixed_batches_have_no_graphs_or_one():
    free = opened(CudaEngine(shape=(-1, -1)))
    assert free.notes == ["no CUDA graphs: for them nothing but the batch in dimension 0 may vary"]
    card = Card()
    fixed = opened(CudaEngine(shape=(4, WIDTH)), card)
    np.testing.assert_array_equal(fixed.run({"x": rows(4)})["y"], 2 * rows(4) + 1)
    assert fixed.notes == [] and (card.captured, card.launches) == (1, 1)


def test_what_the_profile_does_not_hold_is_refused_before_the_card_sees_it():
    inner = CudaEngine()
    engine = opened(inner)
    inner.ran.clear()
    with pytest.raises(UserError, match=r"x is \[9, 3\], but this engine was built for at most \[8, 3\]"):
        engine.run({"x": rows(9)})
    with pytest.raises(UserError, match="x must be float32"):
        engine.run({"x": rows(2).astype(np.float64)})
    assert inner.ran == []


def test_an_output_whose_size_depends_on_the_data_is_refused():
    with pytest.raises(CannotExecute, match=r"the size of output y .* depends on what the inputs hold"):
        opened(CudaEngine(odd_output=True))


def test_memory_on_the_card_is_accounted_for():
    one, two = (opened(slots=slots).memory_bytes for slots in (1, 2))
    buffers = 2 * 8 * WIDTH * 4
    assert (one, two) == (1000 + buffers + 4096, 1000 + 2 * (buffers + 4096))


def test_a_closed_engine_waits_for_what_runs_and_closes_once():
    inner, done = CudaEngine(), []
    engine, inside, go = opened(inner), threading.Event(), threading.Event()
    inner.on_execute = lambda: (inside.set(), go.wait(10))
    asking = threading.Thread(target=lambda: done.append(engine.run({"x": rows(1)})["y"]))
    asking.start()
    assert inside.wait(10)
    closing = threading.Thread(target=engine.close)
    closing.start()
    go.set()
    asking.join(10)
    closing.join(10)
    engine.close()
    np.testing.assert_array_equal(done[0], 2 * rows(1) + 1)


@pytest.mark.parametrize(("largest", "expected"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12)), (64, (1, 2, 4, 8, 16, 32, 64))])
def test_buckets_are_powers_of_two_and_the_largest(largest, expected):
    assert buckets_of(largest) == expected


# --- RTX ------------------------------------------------------------------------------------------------------------


def test_rtx_captures_by_itself_after_every_bucket_was_run_once_and_its_kernels_are_kept(tmp_path):
    inner, card, kept = CudaEngine(rtx=True), Card(), tmp_path / "kept" / "kernels"
    engine = opened(inner, card, kept)
    assert [shape[0] for shape in inner.ran] == [1, 2, 4, 8] and card.captured == 0
    assert engine._plan.config.cuda_graph_strategy == "WHOLE_GRAPH_CAPTURE" and kept.read_bytes() == b"kernels"
    assert opened(CudaEngine(rtx=True), kept=kept).notes == []
    kept.write_bytes(b"damaged")
    assert "kept from earlier runs are of another version or damaged" in opened(CudaEngine(rtx=True), kept=kept).notes[0]


def test_a_plan_that_is_damaged_or_for_another_card_is_refused_by_rtx_itself(tmp_path):
    rtx = pytest.importorskip("tensorrt_rtx")
    runtime = rtx.Runtime(tensorrt._logger())
    with pytest.raises(CannotExecute, match=r"does not take the plan on .*: MALFORMED_ENGINE"):
        tensorrt._refuse_invalid(rtx, runtime, b"no plan" * 500)


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine with a driver and TensorRT, both stand-ins; returns what was deserialized."""
    made = []

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, content):
            if content == b"of another version":
                return None
            made.append(CudaEngine())
            return made[-1]

    trt = SimpleNamespace(**vars(TRT), Runtime=Runtime)
    for name, value in {"_trt": lambda: trt, "driver": lambda: ("sm_90", "13.0"), "open_cuda": Card, "_logger": lambda: SimpleNamespace(errors=["wrong version"])}.items():
        monkeypatch.setattr(tensorrt, name, value)
    return made


def test_a_plan_opened_twice_lies_on_the_card_once_until_both_are_closed(machine, tmp_path):
    (tmp_path / "plan").write_bytes(b"plan")
    first, second = (tensorrt.load(tmp_path / "plan", Options()) for _ in range(2))
    assert len(machine) == 1
    first.close()
    np.testing.assert_array_equal(second.run({"x": rows(2)})["y"], 2 * rows(2) + 1)
    third = tensorrt.load(tmp_path / "plan", Options())
    assert len(machine) == 1
    second.close()
    third.close()
    tensorrt.load(tmp_path / "plan", Options()).close()
    assert len(machine) == 2 and tensorrt._PLANS == {}


def test_a_plan_of_another_version_is_refused_with_tensorrts_reason(machine, tmp_path, monkeypatch):
    (tmp_path / "plan").write_bytes(b"of another version")
    log = SimpleNamespace(errors=[])
    monkeypatch.setattr(tensorrt, "_logger", lambda: log)
    with pytest.raises(CannotExecute, match=r"tensorrt 10\.16 cannot load the plan on sm_90: no reason given"):
        tensorrt.load(tmp_path / "plan", Options())
    assert tensorrt._PLANS == {}


def test_an_engine_that_cannot_be_made_frees_its_plan(machine, tmp_path, monkeypatch):
    (tmp_path / "plan").write_bytes(b"plan")
    monkeypatch.setattr(CudaEngine, "create_execution_context", lambda self, config: None)
    with pytest.raises(CannotExecute, match="no execution context"):
        tensorrt.load(tmp_path / "plan", Options())
    assert tensorrt._PLANS == {}


class Config:
    """Stands in for IBuilderConfig: takes timings that begin with "v1", or none."""

    def create_timing_cache(self, data):
        return SimpleNamespace(data=data, serialize=lambda: b"v1 more")

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return cache.data == b"" or cache.data.startswith(b"v1")

    def get_timing_cache(self):
        return self.cache


def test_timings_are_kept_for_the_next_build_and_foreign_ones_are_taken_again(machine, tmp_path):
    config, timings = Config(), tensorrt._timings(tmp_path / "kept")
    assert timings.name == "timings-tensorrt-10.16-CUDA-driver-13.0-sm_90"
    assert tensorrt._recalled(config, timings) == []
    tensorrt._remember(config, timings)
    assert timings.read_bytes() == b"v1 more" and tensorrt._recalled(config, timings) == [] and config.cache.data == b"v1 more"
    timings.write_bytes(b"foreign")
    assert "taken again" in tensorrt._recalled(config, timings)[0] and config.cache.data == b""
