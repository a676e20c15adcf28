"""Every TensorRT name the platform uses exists in 10.16, in 11.4 and in RTX: asked of the vendor's own bindings, no GPU and no library needed.

The bindings are wheels of a megabyte; what they link against, gigabytes on the vendor's index, is stood in for by empty
functions of the nine names they look up on import. So names can be asked for, and nothing can be run.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from portaisys.engine import gpu, tensorrt

VERSIONS = {"10.16": "10.16.1.11", "11.4": "11.4.0.106"}
SYMBOLS = (
    "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "createInferBuilder_INTERNAL", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
# What only one flavour has, and the code asks for with hasattr or below it.
ONLY_RTX = {
    "ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability", "Runtime.get_engine_validity", "EngineValidity",
    "EngineInvalidityDiagnostics", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy", "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.set_runtime_cache", "IRuntimeCache",
}  # fmt: skip
# Methods by the class they are called on; `trt.X` names are read out of the source.
METHODS = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "INetworkDefinition": "num_inputs get_input",
    "IBuilderConfig": "add_optimization_profile num_compute_capabilities set_compute_capability set_flag clear_flag set_memory_pool_limit builder_optimization_level create_timing_cache set_timing_cache get_timing_cache",
    "IOptimizationProfile": "set_shape",
    "OnnxParser": "parse_from_file num_errors get_error",
    "ParserError": "node_operator node_name desc",
    "ITimingCache": "serialize",
    "Runtime": "deserialize_cuda_engine get_engine_validity",
    "ICudaEngine": "create_execution_context create_runtime_config get_tensor_name num_io_tensors get_tensor_mode get_tensor_dtype get_tensor_shape get_tensor_profile_shape get_engine_stat device_memory_size_v2",
    "IRuntimeConfig": "set_execution_context_allocation_strategy cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy create_runtime_cache set_runtime_cache",
    "IRuntimeCache": "serialize deserialize",
    "IExecutionContext": "set_input_shape set_tensor_address execute_async_v3 set_device_memory get_tensor_shape",
}
_ASK = """
import importlib, json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
trt = importlib.import_module(sys.argv[1])
def there(name):
    found = trt
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            return False
    return True
print(json.dumps([trt.__version__, [name for name in json.loads(sys.argv[2]) if not there(name)]]))
"""


SOURCE = "".join(Path(module.__file__).read_text() for module in (tensorrt, gpu))


def used() -> set[str]:
    tree = ast.parse(SOURCE.replace("from __future__ import annotations", ""))
    names = {ast.unparse(node).removeprefix("trt.") for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("trt.")}
    return {name for name in names if not name.startswith("__")} | {f"{kind}.{method}" for kind, methods in METHODS.items() for method in methods.split()}


def missing(module: str, **environment: str) -> tuple[str, set[str]]:
    said = subprocess.run([sys.executable, "-c", _ASK, module, json.dumps(sorted(used()))], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment})
    assert said.returncode == 0, said.stderr
    version, names = json.loads(said.stdout)
    return version, set(names)


@pytest.fixture(scope="module", params=sorted(VERSIONS))
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    version, folder = VERSIONS[request.param], tmp_path_factory.mktemp("bindings")
    get = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), f"tensorrt_cu13_bindings=={version}"]
    got = subprocess.run(get, capture_output=True, text=True, timeout=300)
    if got.returncode:
        pytest.skip(f"the bindings of TensorRT {version} cannot be downloaded here: {got.stderr.strip().splitlines()[-1]}")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler here to make the empty libraries with (apt-get install gcc)")
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        subprocess.run([compiler, "-shared", "-fPIC", "-nostdlib", "-o", folder / f"{library}.so.{version.partition('.')[0]}", source], check=True)
    return version, folder


def test_every_name_exists_in_the_full_tensorrt(bindings: tuple[str, Path]) -> None:
    version, folder = bindings
    found, names = missing("tensorrt_bindings", PYTHONPATH=str(folder), LD_LIBRARY_PATH=str(folder))
    assert found == version
    assert {name for name in names if not any(name == only or name.startswith(f"{only}.") for only in ONLY_RTX)} == set()
    assert names & ONLY_RTX, "what stands in ONLY_RTX exists in the full TensorRT too: take it out of the table"


def test_every_name_exists_in_rtx() -> None:
    assert missing("tensorrt_rtx")[1] == set()


def test_the_table_of_methods_is_the_sources() -> None:
    for methods in METHODS.values():
        for method in methods.split():
            assert f".{method}" in SOURCE, method


def test_names_that_11_removed_are_not_used() -> None:
    removed = ("BuilderFlag.FP16", "BuilderFlag.INT8", "IInt8", "EXPLICIT_BATCH", "set_output_type", "dynamic_range", "platform_has_fast", "device_memory_size\\b")
    assert [name for name in removed if re.search(name, SOURCE)] == []
