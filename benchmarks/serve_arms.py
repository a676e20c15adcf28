"""The servers that serve_overhead.py compares: `python serve_arms.py SERVER --port P --cnn FILE` serves until SIGTERM.

Each in the Python that has its libraries: `core`, `ray` and `ray_haproxy` in ours, `bare`, `litserve` and `mlserver` in those
that `make bench-setup` makes. All give the same two engines: a function that returns its rows, and the same int8 file in ONNX
Runtime with the same settings, one thread; a body is one row. Knows nothing of measuring.
"""

# No `from __future__ import annotations`: FastAPI and Ray read annotations as they stand.

import argparse
import base64
import os
import signal
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROWS: dict[str, tuple[int, ...]] = {"identity": (196,), "cnn": (1, 28, 28)}
MAX_BATCH = 64
Run = Callable[[np.ndarray], np.ndarray]


def engines(cnn: str) -> dict[str, Run]:
    """Rows [batch, ...] to answers [batch, ...], as the peers hold them: ONNX Runtime without us, with our settings."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.enable_mem_pattern = False
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(cnn, settings, providers=["CPUExecutionProvider"])
    return {"identity": lambda x: x, "cnn": lambda x: session.run(None, {"x": x})[0]}


def row(name: str, body: bytes) -> np.ndarray:
    """The row that a body of raw bytes holds, [...]."""
    return np.frombuffer(body, np.float32).reshape(ROWS[name])


def stopped() -> threading.Event:
    """Set by SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


# --- ours -----------------------------------------------------------------------------------------------------------


class Identity:
    """An engine that costs nothing, so that what is measured is all the rest."""

    backend, precision, device = "identity", "fp32", "cpu"

    def __init__(self) -> None:
        from portaisys.engine import Tensor

        self.inputs, self.outputs = (Tensor("x", "float32", (-1, *ROWS["identity"])),), (Tensor("y", "float32", (-1, *ROWS["identity"])),)

    def run(self, feeds: Any) -> Any:
        return {"y": feeds["x"]}

    def close(self) -> None:
        pass


def core(cnn: str, port: int | None) -> Any:
    """A replica without Ray, as serve.app makes one, of engines instead of published versions."""
    from portaisys.engine import Options, onnxruntime
    from portaisys.serve.batcher import Batcher
    from portaisys.serve.core import Core, Listen
    from portaisys.serve.model import ServedModel, Stats
    from portaisys.serve.repository import of_models

    def served(name: str, engine: Any) -> ServedModel:
        stats = Stats()
        return ServedModel(name, "1", engine, Batcher(engine.run, max_batch=MAX_BATCH, observe=stats.batch), (), {"digest": "0" * 64}, (), stats)

    models = of_models(served("identity", Identity()), served("cnn", onnxruntime.load(Path(cnn), Options("int8", provider="cpu"))))
    return Core(models, (), Listen(http_port=port)).start()


def serve_core(cnn: str, port: int) -> None:
    stop, running = stopped(), core(cnn, port)
    stop.wait()
    running.stop()


# --- Ray Serve ------------------------------------------------------------------------------------------------------


def ours_on_serve(cnn: str) -> Any:
    """What serve.app.Replica does with a request, without a registry."""
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    @serve.deployment(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 1})
    class Ours:
        def __init__(self, path: str) -> None:
            self.core = core(path, None)

        async def __call__(self, request: Request) -> Response:
            from portaisys.serve.app import read_body

            body = await read_body(request)
            reply = await self.core.handle(request.method, request.scope["path"].removeprefix(request.scope.get("root_path", "")), request.headers, body)
            return Response(reply.body, reply.status, dict(reply.headers))

    return Ours.bind(cnn)


def ordinary_on_serve(cnn: str) -> Any:
    """Ray Serve as its documentation shows it: a FastAPI ingress and @serve.batch. Raw bytes, so nobody pays for JSON."""
    from fastapi import FastAPI, Request, Response
    from ray import serve

    app = FastAPI()

    # max_ongoing_requests: its default, 5, would let no batch beyond 5 form.
    @serve.deployment(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 1})
    @serve.ingress(app)
    class Ordinary:
        def __init__(self, path: str) -> None:
            self.engines = engines(path)

        @serve.batch(max_batch_size=MAX_BATCH)
        async def run_identity(self, rows: list[Any]) -> list[Any]:
            return list(self.engines["identity"](np.stack(rows)))

        @serve.batch(max_batch_size=MAX_BATCH)
        async def run_cnn(self, rows: list[Any]) -> list[Any]:
            return list(self.engines["cnn"](np.stack(rows)))

        @app.post("/identity")
        async def identity(self, request: Request) -> Response:
            answer = await self.run_identity(row("identity", await request.body()))
            return Response(answer.tobytes(), media_type="application/octet-stream")

        @app.post("/cnn")
        async def cnn(self, request: Request) -> Response:
            answer = await self.run_cnn(row("cnn", await request.body()))
            return Response(answer.tobytes(), media_type="application/octet-stream")

    return Ordinary.bind(cnn)


def serve_ray(cnn: str, port: int, *, quiet: bool = False) -> None:
    import ray
    from ray import serve

    stop = stopped()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=os.environ["SERVE_ARMS_TEMP"])
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for name, app in {"ours": ours_on_serve(cnn), "ordinary": ordinary_on_serve(cnn)}.items():
            serve.run(app, name=name, route_prefix=f"/{name}", logging_config={"enable_access_log": False} if quiet else None)
        stop.wait()
        serve.shutdown()
    finally:
        ray.shutdown()


def serve_ray_haproxy(cnn: str, port: int) -> None:
    """RAY_SERVE_ENABLE_HA_PROXY is in the environment already: Ray reads it when it is imported."""
    serve_ray(cnn, port, quiet=True)


# --- peers ----------------------------------------------------------------------------------------------------------


def serve_bare(cnn: str, port: int) -> None:
    """FastAPI, uvicorn and ONNX Runtime, called where the request is."""
    import uvicorn
    from fastapi import FastAPI, Request, Response

    app, models = FastAPI(), engines(cnn)

    @app.post("/{name}")
    async def infer(name: str, request: Request) -> Response:
        answer = models[name](row(name, await request.body())[None])
        return Response(answer.tobytes(), media_type="application/octet-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if find_spec("litserve"):
    import litserve

    class Lit(litserve.LitAPI):  # LitServe hands it to worker processes, so it stands where they can import it
        """LitServe takes JSON only; base64 is the least that a tensor costs there."""

        def __init__(self, name: str, cnn: str) -> None:
            super().__init__(max_batch_size=MAX_BATCH, api_path=f"/{name}")
            self.name, self.cnn = name, cnn

        def setup(self, device: str) -> None:
            self.engine = engines(self.cnn)[self.name]

        def decode_request(self, request: dict[str, str]) -> np.ndarray:
            return row(self.name, base64.b64decode(request["x"]))

        def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
            return np.stack(inputs)

        def predict(self, x: np.ndarray) -> np.ndarray:
            return self.engine(x)

        def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
            return list(output)

        def encode_response(self, output: np.ndarray) -> dict[str, str]:
            return {"y": base64.b64encode(output.tobytes()).decode()}

    def serve_litserve(cnn: str, port: int) -> None:
        server = litserve.LitServer([Lit(name, cnn) for name in ROWS], accelerator="cpu", fast_queue=True)
        server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if find_spec("mlserver"):
    import mlserver as ml_server
    from mlserver.codecs import NumpyCodec

    class Runtime(ml_server.MLModel):  # MLServer imports it by its name
        """Both engines; MLServer batches requests before `predict` is called."""

        async def load(self) -> bool:
            self.engine = engines(self.settings.parameters.uri)[self.settings.name]
            return True

        async def predict(self, payload: ml_server.types.InferenceRequest) -> ml_server.types.InferenceResponse:
            x = NumpyCodec.decode_input(payload.inputs[0])
            return ml_server.types.InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", self.engine(x))])

    def serve_mlserver(cnn: str, port: int) -> None:
        import asyncio
        import socket

        with socket.create_server(("127.0.0.1", 0)) as grpc, socket.create_server(("127.0.0.1", 0)) as metrics:
            others = {"grpc_port": grpc.getsockname()[1], "metrics_port": metrics.getsockname()[1]}
        settings = ml_server.Settings(host="127.0.0.1", http_port=port, parallel_workers=0, debug=False, **others)
        batching = {"max_batch_size": MAX_BATCH, "max_batch_time": 0.001}
        parameters = ml_server.settings.ModelParameters(uri=cnn)
        models = [ml_server.ModelSettings(name=name, implementation=f"{Path(__file__).stem}.Runtime", parameters=parameters, **batching) for name in ROWS]
        asyncio.run(ml_server.MLServer(settings).start(models))


SERVERS = {name.removeprefix("serve_"): function for name, function in list(globals().items()) if name.startswith("serve_")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cnn", required=True)
    given = parser.parse_args()
    SERVERS[given.server](given.cnn, given.port)
