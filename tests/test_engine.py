"""Engines: what they build and answer, what they refuse and why. TensorRT-RTX really builds, without a GPU."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx_graphs import Graph, cnn, rows

from portaisys import models, spec
from portaisys.compress.quantize import quantize
from portaisys.engine import (
    BACKENDS,
    REMEMBERED,
    RUN_ONLY,
    CannotExecute,
    Options,
    Tensor,
    backend,
    check_feeds,
    options_of,
    recalled,
    remembered,
)
from portaisys.engine import cpu as processor
from portaisys.engine import onnxruntime as cpu
from portaisys.engine import openvino as vino
from portaisys.engine import tensorrt as gpu
from portaisys.engine.torch import TorchEngine
from portaisys.export import export
from portaisys.spec import BACKEND_PRECISIONS, Quantize, UserError

FP32, INT8 = Options("fp32"), Options("int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def fp32(folder):
    return cnn(folder / "cnn.onnx")


@pytest.fixture(scope="module")
def int8(fp32):
    path = fp32.with_name("cnn_int8.onnx")
    quantize(fp32, path, rows(100), Quantize())
    return path


@pytest.fixture(scope="module")
def transformer(folder):
    """A real export: attention, layer norm, GELU."""
    torch.manual_seed(0)
    model = models.build(spec.Transformer(name="transformer", dim=32, depth=1, heads=2), (1, 12, 12), 10, 0.0, 1.0)
    export(model, rows(64), spec.Export(max_batch=16), folder / "transformer.onnx")
    return folder / "transformer.onnx"


def plain(path, x):
    """Answers of ORT as it comes, of the signed file as it is."""
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def answer(path, options, x, out):
    cpu.build(path, options, out)
    engine = cpu.load(out, options)
    return engine.run({"x": x})[engine.outputs[0].name]


def relative(expected, actual):
    return np.abs(expected - actual).mean() / np.abs(expected).mean()


# --- the interface --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_every_backend_offers_the_whole_interface(name):
    module = backend(name)
    assert BACKEND_PRECISIONS[name] == module.PRECISIONS
    assert all(callable(getattr(module, verb)) for verb in ("version", "device", "build", "load"))
    assert module.version()
    assert module.device()


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"engine\.backend: 'openvion' is not one of onnxruntime, openvino, tensorrt"):
        backend("openvion")


def test_engines_need_neither_torch_nor_the_offline_half():
    code = (
        "import sys; from portaisys.engine import cache, onnxruntime, tensorrt; tensorrt.version(); tensorrt.device(); "
        "print(sorted(m for m in sys.modules if m in ('torch', 'ray') or m.split('.')[:2] in (['portaisys', p] for p in ('data', 'models', 'compress'))))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_tensorrt_is_imported_nowhere_else():
    root = Path(cpu.__file__).parents[1]
    assert [path.name for path in root.rglob("*.py") if "tensorrt_rtx\"" in path.read_text()] == ["tensorrt.py"]


def test_options_come_from_the_spec_and_are_remembered_by_a_version():
    engine = spec.Engine(objective="throughput", slots=2, cuda_graphs=False, workspace_mib=64, optimization_level=5, sparse=True, threads=2, provider="cpu")
    options = options_of(engine, spec.Export(opt_batch=4, max_batch=16))
    assert options == Options("fp32", 4, 16, (), "throughput", "cpu", 64, 5, True, "fp32", 2, 2, False)
    assert options_of(spec.Engine(backend="openvino", precisions=("fp32", "bf16", "int8")), spec.Export()).rest == "bf16"
    about = {"opt_batch": 4, "max_batch": 16, "dims": [["seq", 1, 2, 3]], "options": remembered(options)}
    assert recalled(about, "fp32", 2) == Options("fp32", 4, 16, (("seq", 1, 2, 3),), "throughput", "cpu", 64, 5, True, "fp32", 2, 2, False)
    assert recalled({"opt_batch": 4, "max_batch": 16}, "int8", 1) == Options("int8", 4, 16)  # published before there were any
    given_apart = {"precision", "opt_batch", "max_batch", "dims", "threads"}
    assert {*REMEMBERED} | given_apart == {*Options.__dataclass_fields__} and {*RUN_ONLY} <= {*Options.__dataclass_fields__}


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_fp32_engine_answers_as_the_reference_does(fp32, tmp_path, batch):
    x = rows(batch, seed=3)
    expected = ReferenceEvaluator(str(fp32)).run(None, {"x": x})[0]
    np.testing.assert_allclose(answer(fp32, FP32, x, tmp_path / "engine"), expected, rtol=1e-3, atol=1e-4)


def test_an_fp32_engine_is_the_file_itself(fp32, tmp_path):
    assert cpu.build(fp32, FP32, tmp_path / "engine") == []
    assert (tmp_path / "engine").read_bytes() == fp32.read_bytes()


def test_an_engine_says_what_it_takes_and_gives(fp32):
    engine = cpu.load(fp32, FP32)
    assert engine.inputs == (Tensor("x", "float32", (-1, 1, 12, 12)),)
    assert [(tensor.dtype, tensor.shape) for tensor in engine.outputs] == [("float32", (-1, 10))]
    assert (engine.backend, engine.precision, engine.device) == ("onnxruntime", "fp32", cpu.device())


def test_an_engine_runs_from_another_thread(fp32):
    engine, answers = cpu.load(fp32, FP32), []
    thread = threading.Thread(target=lambda: answers.append(engine.run({"x": rows(2)})))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(*answers[0].values(), *engine.run({"x": rows(2)}).values())


def test_the_unsigned_int8_engine_answers_as_the_signed_file_does(int8, tmp_path):
    # Rows within the calibrated range: beyond it unsigned keeps what signed clips.
    x = rows(100)
    assert relative(plain(int8, x), answer(int8, INT8, x, tmp_path / "engine")) < 2e-3


def test_the_int8_engine_answers_the_same_alone_and_in_a_batch(int8, tmp_path):
    cpu.build(int8, INT8, tmp_path / "engine")
    engine, x = cpu.load(tmp_path / "engine", INT8), rows(9, seed=4)
    alone = np.concatenate([next(iter(engine.run({"x": x[i : i + 1]}).values())) for i in range(9)])
    np.testing.assert_allclose(next(iter(engine.run({"x": x}).values())), alone, atol=1e-6)


def test_no_signed_activation_is_left_and_the_artifact_is_untouched(int8, tmp_path):
    before = int8.read_bytes()
    graph = onnx.load(int8).graph
    count = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    assert cpu.make_unsigned(graph) == count
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {types[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"} == {TensorProto.UINT8}
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in types]
    assert weights
    assert {types[node.input[2]] for node in weights} == {TensorProto.INT8}
    assert int8.read_bytes() == before


def test_what_a_relu_feeds_begins_at_zero_and_the_rest_at_128(int8):
    graph = onnx.load(int8).graph
    cpu.make_unsigned(graph)
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    found = {(made_by.get(node.input[0], "input"), node.input[2]) for node in graph.node if node.op_type == "QuantizeLinear"}
    assert found == {("Relu", "portaisys.uint8_0"), ("input", "portaisys.uint8_128"), ("Conv", "portaisys.uint8_128")}


def test_full_range_weights_do_not_overflow_on_a_cpu_without_vnni(folder, tmp_path):
    # Measured without the session switch on such a CPU: several times the error of the signed file.
    wide = cnn(folder / "wide.onnx", width=64)
    quantize(wide, folder / "wide_int8.onnx", rows(100), Quantize(reduce_range=False))
    x = rows(100)
    exact = plain(wide, x)
    signed, engine = plain(folder / "wide_int8.onnx", x), answer(folder / "wide_int8.onnx", INT8, x, tmp_path / "engine")
    assert relative(exact, engine) < 1.2 * relative(exact, signed)


def test_io_binding_gives_the_same_answers(fp32):
    session = cpu.load(fp32, FP32)._session
    bound, direct = (cpu.OrtEngine(session, "fp32", bound=bound) for bound in (True, False))
    spread = np.repeat(rows(3), 2, axis=0)[::2]  # not contiguous
    for x in (rows(1), rows(5), spread):
        np.testing.assert_array_equal(*(next(iter(engine.run({"x": x}).values())) for engine in (bound, direct)))


def test_the_provider_is_the_cpu_unless_this_build_and_machine_have_a_gpu(monkeypatch):
    assert cpu.provider("cpu") == "cpu"
    monkeypatch.setattr(cpu.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(cpu, "driver", lambda: None)
    assert cpu.provider("auto") == "cpu" and cpu.device() == processor.device()
    monkeypatch.setattr(cpu, "driver", lambda: ("sm_90", "13.0"))
    assert cpu.provider("auto") == "cuda" and cpu.device() == f"{processor.device()}+sm_90"


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_this_build_lacks_is_refused_with_what_it_has(fp32, tmp_path, provider):
    with pytest.raises(UserError, match=rf"engine\.provider: '{provider}' needs a build .*onnxruntime-gpu.*CPUExecutionProvider"):
        cpu.build(fp32, Options(provider=provider), tmp_path / "engine")


def test_a_provider_that_does_not_start_is_not_replaced_by_the_cpu_in_silence(fp32, monkeypatch):
    # What ONNX Runtime does when CUDA's libraries do not load: it opens the file on the CPU and only logs.
    monkeypatch.setattr(cpu, "provider", lambda asked: "cuda")
    monkeypatch.setitem(cpu.PROVIDERS, "cuda", ("CUDAExecutionProvider", "CPUExecutionProvider"))
    opened = ort.InferenceSession(str(fp32), providers=["CPUExecutionProvider"])
    monkeypatch.setattr(cpu.onnxruntime, "InferenceSession", lambda *given, **options: opened)
    with pytest.raises(UserError, match=r"engine\.provider: CUDAExecutionProvider did not start here"):
        cpu.load(fp32, FP32)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512bw avx512_vnni amx_int8", "cpu-amx_int8"),
        ("fpu avx2 avx512f avx512bw avx512_vnni", "cpu-avx512_vnni"),
        ("fpu avx2 avx_vnni", "cpu-avx2_vnni"),
        ("fpu avx2 avx512f avx512bw", "cpu-avx512"),
        ("fpu avx avx2", "cpu-avx2"),
    ],
)
def test_the_device_class_is_what_decides_the_integer_kernels(tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert processor.device(tmp_path / "cpuinfo") == expected


def test_without_cpuinfo_the_device_is_the_architecture(tmp_path):
    assert processor.device(tmp_path / "none").startswith("cpu-")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_int8_of_a_file_that_was_never_quantized_is_refused(fp32, tmp_path, name):
    with pytest.raises(UserError, match=r"'int8' was asked for, but .* holds no QuantizeLinear"):
        backend(name).build(fp32, INT8, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_a_quantized_file_is_not_passed_off_as_fp32(int8, tmp_path, name):
    with pytest.raises(UserError, match=r"'fp32' was asked for, but .* is quantized"):
        backend(name).build(int8, FP32, tmp_path / "engine")


@pytest.mark.parametrize("name", sorted(BACKENDS))
@pytest.mark.parametrize("part", [0, 10, 0.3, 0.9])
def test_a_truncated_file_is_named(fp32, tmp_path, name, part):
    data = fp32.read_bytes()
    (tmp_path / "half.onnx").write_bytes(data[: part if isinstance(part, int) else int(part * len(data))])
    with pytest.raises(UserError, match=r"half\.onnx: not an ONNX file, or a damaged one"):
        backend(name).build(tmp_path / "half.onnx", FP32, tmp_path / "engine")


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=r"none\.onnx: cannot be read \(No such file"):
        backend(name).build(tmp_path / "none.onnx", FP32, tmp_path / "engine")


def test_a_built_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / "engine").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="engine: ONNX Runtime cannot open it"):
        cpu.load(tmp_path / "engine", FP32)


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_weights_in_another_file_are_refused(fp32, tmp_path, name):
    onnx.save(onnx.load(fp32), tmp_path / "split.onnx", save_as_external_data=True, location="weights.bin", size_threshold=100)
    with pytest.raises(UserError, match="weights are in another file"):
        backend(name).build(tmp_path / "split.onnx", FP32, tmp_path / "engine")


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [
        ({}, "takes x; got nothing"),
        ({"y": np.zeros((1, 2), np.float32)}, "takes x; got y"),
        ({"x": np.zeros((1, 2))}, r"x must be float32 of shape \[-1, 2\]; it is float64 of \[1, 2\]"),
        ({"x": np.zeros((1, 3), np.float32)}, r"it is float32 of \[1, 3\]"),
        ({"x": np.zeros(2, np.float32)}, r"it is float32 of \[2\]"),
        ({"x": np.zeros((0, 2), np.float32)}, "at least one; they have"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(feeds, reason):
    with pytest.raises(UserError, match=reason):
        check_feeds((Tensor("x", "float32", (-1, 2)),), feeds)


def test_inputs_of_different_lengths_are_refused():
    inputs = (Tensor("a", "float32", (-1,)), Tensor("b", "float32", (-1,)))
    with pytest.raises(UserError, match=r"same number of rows, at least one; they have \[2, 3\]"):
        check_feeds(inputs, {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})


# --- OpenVINO -------------------------------------------------------------------------------------------------------


def opened(path, options, out):
    vino.build(path, options, out)
    return vino.load(out, options)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_openvino_answers_as_the_reference_does_at_every_batch(fp32, transformer, tmp_path, batch):
    for path in (fp32, transformer):
        x = rows(batch, seed=3)
        (answer,) = opened(path, FP32, tmp_path / "engine").run({"x": x}).values()
        np.testing.assert_allclose(answer, plain(path, x), rtol=1e-3, atol=1e-4)


def test_openvino_takes_the_signed_int8_file_as_it_is(int8, tmp_path):
    (answer,) = opened(int8, INT8, tmp_path / "engine").run({"x": rows(100)}).values()
    assert relative(plain(int8, rows(100)), answer) < 0.02


def test_openvino_computes_in_bf16_or_says_that_this_cpu_cannot(fp32, tmp_path):
    if "bf16" not in Path("/proc/cpuinfo").read_text():
        with pytest.raises(UserError, match=r"'bf16' has no arithmetic on this CPU"):
            vino.build(fp32, Options("bf16"), tmp_path / "engine")
        return
    (answer,) = opened(fp32, Options("bf16"), tmp_path / "engine").run({"x": rows(20)}).values()
    assert 1e-4 < relative(plain(fp32, rows(20)), answer) < 0.02  # not fp32 under another name


def test_openvino_says_what_it_takes_and_what_it_cannot_open(fp32, tmp_path):
    engine = opened(fp32, FP32, tmp_path / "engine")
    assert engine.inputs == (Tensor("x", "float32", (-1, 1, 12, 12)),) and [tensor.shape for tensor in engine.outputs] == [(-1, 10)]
    spread = np.repeat(rows(3), 2, axis=0)[::2]  # not contiguous
    np.testing.assert_array_equal(*(next(iter(engine.run({"x": x}).values())) for x in (spread, rows(3))))
    (tmp_path / "half").write_bytes((tmp_path / "engine").read_bytes()[:1000])
    with pytest.raises(UserError, match="half: OpenVINO cannot open it"):
        vino.load(tmp_path / "half", FP32)


def test_an_int8_engine_computes_the_rest_in_bf16_only_where_it_was_asked_for_and_the_cpu_has_it(int8, tmp_path):
    answers = {}
    for rest in ("fp32", "bf16"):
        options = Options("int8", rest=rest)
        vino.build(int8, options, tmp_path / rest)
        (answers[rest],) = vino.load(tmp_path / rest, options).run({"x": rows(40)}).values()
    if "bf16" in Path("/proc/cpuinfo").read_text():
        assert 0 < relative(answers["fp32"], answers["bf16"]) < 0.03
    else:
        np.testing.assert_array_equal(answers["fp32"], answers["bf16"])


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_openvino_for_throughput_shares_a_batch_out_and_puts_it_together_in_order(fp32, tmp_path, batch):
    options = Options(hint="throughput", threads=2)
    engine = opened(fp32, options, tmp_path / "engine")
    requests = engine._lanes.get()
    assert len(requests) == 2
    engine._lanes.put(requests)
    x = rows(batch, seed=5)
    (answer,) = engine.run({"x": x}).values()
    np.testing.assert_allclose(answer, plain(fp32, x), rtol=1e-3, atol=1e-4)
    before = answer.copy()
    engine.run({"x": rows(batch, seed=6)})
    np.testing.assert_array_equal(answer, before)  # an answer is not overwritten by the next batch


@pytest.mark.parametrize(("hint", "threads"), [("latency", 1), ("throughput", 2)])
def test_openvino_takes_calls_of_several_threads_at_once_and_mixes_no_rows(fp32, tmp_path, hint, threads):
    rng = np.random.default_rng(0)
    vino.build(fp32, Options("fp32", hint=hint), tmp_path / "v")
    engine = vino.load(tmp_path / "v", Options("fp32", hint=hint, threads=threads, slots=2))
    feeds = [rng.normal(size=(1 + number % 8, *engine.inputs[0].shape[1:])).astype(np.float32) for number in range(60)]
    name, scores = engine.inputs[0].name, engine.outputs[0].name
    expected = [engine.run({name: x})[scores] for x in feeds]
    with ThreadPoolExecutor(4) as threads_of_callers:
        answers = list(threads_of_callers.map(lambda x: engine.run({name: x})[scores], feeds * 5))
    for answer, right in zip(answers, expected * 5, strict=True):
        np.testing.assert_allclose(answer, right, rtol=1e-4, atol=1e-5)
    engine.close()


def test_without_openvino_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'portaisys\[openvino\]'"):
        vino.version()


# --- torch ----------------------------------------------------------------------------------------------------------


def faces(*outputs):
    return (Tensor("a", "float32", (-1, 4)), Tensor("n", "int64", (-1,))), tuple(Tensor(name, dtype, (-1,)) for name, dtype in outputs)


@pytest.mark.parametrize("made", [lambda a, n: (a.sum(1), n + 1), lambda a, n: {"count": n + 1, "sum": a.sum(1)}])
def test_torch_is_an_engine_of_whatever_callable_it_is_handed(made):
    engine = TorchEngine(made, *faces(("sum", "float32"), ("count", "int64")))
    a, n = rows(3).reshape(3, -1)[:, :4], np.arange(3)
    found = engine.run({"a": a, "n": n})
    np.testing.assert_allclose(found["sum"], a.sum(1), rtol=1e-6)
    np.testing.assert_array_equal(found["count"], n + 1)
    with pytest.raises(UserError, match="a must be float32"):
        engine.run({"a": a.astype(np.float64), "n": n})


def test_torch_compiled_and_in_bf16_answers_as_eager_does():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1), torch.nn.Flatten(0)).eval()
    face = (Tensor("a", "float32", (-1, 4)),), (Tensor("y", "float32", (-1,)),)
    a = rows(5).reshape(5, -1)[:, :4]
    eager, compiled, low = (TorchEngine(model, *face, **how).run({"a": a})["y"] for how in ({}, {"compiled": True}, {"precision": "bf16"}))
    np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-6)
    assert 1e-5 < relative(eager, low) < 0.03 and low.dtype == np.float32
    with pytest.raises(UserError, match="torch: 'int8' is not one of fp32, bf16, fp16"):
        TorchEngine(model, *face, precision="int8")


# --- TensorRT -------------------------------------------------------------------------------------------------------


def test_without_tensorrt_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UserError, match=r"pip install 'portaisys\[tensorrt-rtx\]'"):
        gpu.version()


@pytest.mark.parametrize("what", ["fp32", "int8"])
def test_rtx_builds_a_cnn(request, tmp_path, what):
    notes = gpu.build(request.getfixturevalue(what), Options(what), tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_size > 10_000
    if gpu.device() == "none":
        assert notes == ["no GPU here: built for SM89, as proof that tensorrt_rtx takes this graph"]


@pytest.mark.parametrize("what", ["fp32", "int8"])
def test_rtx_builds_a_transformer(transformer, tmp_path, what):
    path = transformer
    if what == "int8":
        path = tmp_path / "int8.onnx"
        assert quantize(transformer, path, rows(40), Quantize())["quantized_nodes"] >= 6
        x = rows(40)
        assert relative(plain(transformer, x), answer(path, INT8, x, tmp_path / "engine")) < 0.05
    gpu.build(path, Options(what, opt_batch=4, max_batch=16), tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_size > 10_000


@pytest.mark.skipif(gpu.device() != "none", reason="this machine has a GPU")
def test_without_a_driver_a_plan_is_built_and_not_run(fp32, tmp_path):
    gpu.build(fp32, FP32, tmp_path / "plan")
    with pytest.raises(CannotExecute, match="built but not run: this machine has no NVIDIA driver"):
        gpu.load(tmp_path / "plan", FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["fp32", "int8"])
def test_tensorrt_answers_as_onnx_runtime_does(request, tmp_path, what):
    path = request.getfixturevalue(what)
    gpu.build(path, Options(what), tmp_path / "plan")
    engine = gpu.load(tmp_path / "plan", Options(what))
    for batch in (1, 2, 8, 64):
        x = rows(batch, seed=batch)
        assert relative(plain(path, x), engine.run({"x": x})[engine.outputs[0].name]) < (1e-3 if what == "fp32" else 0.05)
    with pytest.raises(UserError, match="65 rows, but this engine was built for at most 64"):
        engine.run({"x": rows(65)})
    engine.close()


def test_the_parser_says_what_it_refuses(tmp_path):
    graph = Graph()
    path = graph.save(tmp_path / "odd.onnx", graph.op("Unheard", "x"), ["batch", 10])
    model = onnx.load(path)
    model.opset_import.extend([onnx.helper.make_opsetid("test.odd", 1)])
    model.graph.node[0].domain = "test.odd"
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"odd\.onnx: TensorRT's parser refuses it: Unheard Unheard_0"):
        gpu.build(path, FP32, tmp_path / "plan")
    with pytest.raises(UserError, match=r"odd\.onnx: ONNX Runtime cannot open it"):
        cpu.build(path, FP32, tmp_path / "engine")


def test_a_fixed_batch_is_built_for_that_batch_only(tmp_path):
    path = cnn(tmp_path / "fixed.onnx", batch=4)
    gpu.build(path, Options("fp32", opt_batch=4, max_batch=4), tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_size > 10_000
    with pytest.raises(UserError, match=r"input x has its batch fixed at 4; build it for that batch \(opt_batch and max_batch 4\), or export it with a free one"):
        gpu.build(path, FP32, tmp_path / "plan")


def test_a_free_dimension_has_a_profile_or_is_asked_for(tmp_path):
    path = words(tmp_path / "words.onnx")
    gpu.build(path, Options("fp32", dims=(("seq", 1, 16, 64),)), tmp_path / "plan")
    with pytest.raises(UserError, match=r"input ids has the free dimension 'seq'; give its least, usual and largest size"):
        gpu.build(path, FP32, tmp_path / "plan")


def test_a_profile_whose_least_is_above_its_largest_is_refused():
    for wrong in ({"opt_batch": 8, "max_batch": 4}, {"dims": (("seq", 64, 8, 32),)}, {"dims": (("seq", 0, 8, 32),)}):
        with pytest.raises(UserError, match=r"engine profile: (batch|seq) goes from"):
            Options(**wrong)


def words(path):
    """Ids of words to a score each row: integers, two free dimensions."""
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [node("Gather", ["table", "ids"], ["e"]), node("ReduceMean", ["e"], ["y"], axes=[1], keepdims=0)]
    ids = onnx.helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "seq"])
    y = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    graph = onnx.helper.make_graph(nodes, "g", [ids], [y], [tensor(np.ones((20, 8), np.float32), "table")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("options", [Options("tf32"), Options(workspace_mib=64), Options(optimization_level=1), Options(sparse=True)])
def test_rtx_takes_every_build_option(fp32, tmp_path, options):
    gpu.build(fp32, options, tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_size > 10_000
