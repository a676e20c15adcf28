"""The Ray Serve application: one deployment that answers the Open Inference Protocol for one published version.

    serve.run(build_app(ServeArgs(model="digits@production")))
    serve deploy serve_apps/digits.yaml

Knows Ray and the raw HTTP request; what they mean is protocol.py's. Where it is mounted is Ray's route_prefix.
"""

# No `from __future__ import annotations` here: Ray reads the annotation of build_app's argument as it stands, and with
# a string there it hands over an unchecked dict without a word.

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from portaisys.serve import protocol
from portaisys.serve.codec import MAX_BODY_BYTES, RefusedError
from portaisys.serve.core import Core, Listen
from portaisys.serve.model import Limits
from portaisys.serve.ray_metrics import RayMetrics, ReplyMetrics
from portaisys.serve.repository import Change, Room, of_storage
from portaisys.serve.scaling import LOAD, Autoscale, LoadMeter
from portaisys.serve.siblings import Changes, Siblings
from portaisys.spec import Precision, Storage, UserError

logger = logging.getLogger("portaisys.serve")


class ServeArgs(BaseModel):
    """Arguments of the application. `model`: NAME@ALIAS, NAME@VERSION, NAME@latest:2, ..., or several of them; `max_batch`: None is what the version was verified up to.

    `data_port`, `grpc_port`: where replicas listen themselves, beside the Serve route; those of a machine share them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str | tuple[str, ...]
    storage: Storage = Storage()
    precision: Precision | None = None
    max_batch: int | None = Field(None, ge=1)
    max_delay_ms: float = Field(0.0, ge=0)
    max_queue: int = Field(1024, ge=1)
    threads: int = Field(1, ge=1)
    # Batches that run at once on one engine, each on `threads` of its own; None: as the version was judged.
    instances: int | None = Field(None, ge=1, le=64)
    # What the engines of a replica may take together; the model that was asked least recently leaves memory beyond it. None: no limit.
    memory_mib: float | None = Field(None, gt=0)
    # Of answers kept for inputs that come again; 0: none are.
    response_cache_mib: float = Field(0.0, ge=0)
    data_host: str = "127.0.0.1"
    data_port: int | None = Field(None, ge=0, le=65535)
    grpc_port: int | None = Field(None, ge=0, le=65535)
    tls_cert: str = ""
    tls_key: str = ""
    keys: str = ""
    # Of so many batches one is answered by the fp32 engine too, for the precision ladder; 0: none.
    check_every: int = Field(100, ge=0)
    num_replicas: int = Field(1, ge=1)
    # Instead of num_replicas: as many as the load needs.
    autoscale: Autoscale | None = None
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    # Labels that a node must have to hold a replica, {role: inference} on the clusters of docs/cluster.md.
    label_selector: dict[str, str] = {}
    # Of num_replicas, started beside the old ones when a changed file rolls over: loses no request, needs room for them.
    max_surge_percent: int = Field(100, ge=0, le=100)

    @model_validator(mode="after")
    def _queue_holds_a_batch(self) -> "ServeArgs":
        if self.max_batch is not None and self.max_batch > self.max_queue:
            raise ValueError(f"max_queue {self.max_queue} is below max_batch {self.max_batch}, so no batch could fill; raise max_queue")
        return self

    @model_validator(mode="after")
    def _one_number_of_replicas(self) -> "ServeArgs":
        if self.autoscale is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("num_replicas and autoscale both say how many replicas there are; keep one")
        return self

    @property
    def references(self) -> tuple[str, ...]:
        return (self.model,) if isinstance(self.model, str) else self.model

    @property
    def limits(self) -> Limits:
        return Limits(self.max_batch, self.max_delay_ms, self.max_queue, self.threads, self.precision, self.check_every, self.instances)


JOINS = 5  # health checks, one every two seconds, at which a replica asks the others at least


class Replica:
    """One process with the engines of an application. Ray sends it requests once the constructor is done, which is when they are warm."""

    def __init__(self, args: dict[str, Any]) -> None:
        parsed = ServeArgs.model_validate(args)
        _log_where_serve_logs()
        self._replies = ReplyMetrics()
        models = of_storage(parsed.storage, parsed.limits, RayMetrics, Room(parsed.memory_mib, parsed.response_cache_mib))
        listen = Listen(host=parsed.data_host, http_port=parsed.data_port, grpc_port=parsed.grpc_port, tls_cert=parsed.tls_cert, tls_key=parsed.tls_key, keys=parsed.keys, shared=True)
        self._siblings, self._load = Siblings(parsed.references), LoadMeter()
        models.tell_others = self._siblings.tell
        # Before it listens: the kernel sends a share of the connections to whoever does.
        self._core = Core(models, parsed.references, listen, self._replies.count, before=self._join).start()
        for model in self._core.models.all():
            RayMetrics(f"{model.name}@{model.version}").fallbacks(model.fallbacks)
        self._joining: asyncio.Task[bool] | None = None
        self._joins = 0
        if self._core.ports:
            logger.info("listening on %s at %s", parsed.data_host, self._core.ports)

    async def __call__(self, request: Request) -> Response:
        try:
            body = await read_body(request)
        except RefusedError as refused:
            reply = protocol.error(refused.status, str(refused))
        else:
            path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
            reply = await self._core.handle(request.method, path, request.headers, body)
        self._replies.count(reply.status)
        return Response(reply.body, reply.status, dict(reply.headers))

    async def changed(self, by: str, name: str, change: Change) -> str:
        """Another replica was asked to load or unload: do so too. Returns why not, or nothing."""
        return "" if by == self._siblings.mine else await asyncio.to_thread(self._core.run, self._core.follow_hand(name, change))

    async def changes(self, by: str, references: list[str]) -> Changes:
        """What was loaded and unloaded by hand here, for a replica of the same arguments: with others they count, not what was done before."""
        return {} if by == self._siblings.mine or references != self._siblings.references else dict(self._core.models.by_hand)

    async def _join(self, core: Core) -> bool:
        """Do, on the core's loop, what the others were asked before this replica was there to be told. Whether all of it is known and done."""
        try:
            found = await self._siblings.changes()
        except UserError as problem:
            logger.warning("joining: %s", problem)
            return False
        problems = [await core.follow_hand(name, change) for name, changes in found.items() for change in changes]
        return not any(problems)

    async def _joined(self) -> bool:
        return await asyncio.to_thread(self._core.run, self._join(self._core))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray's controller hears of this replica for its policy."""
        return {LOAD: self._load.read(self._core.models.all())}

    async def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        self._join_again()
        self._replies.flush()
        self._replies.models(list(self._core.models.all()))
        for model in list(self._core.models.all()):
            if not model.ready:
                raise RuntimeError(f"{model.name}: the engine has been in one run for {model.batcher.busy_s():.0f} s")

    def _join_again(self) -> None:
        """Ray tells the others of this replica some time after it started: what they were asked until then is asked for again, until all is done."""
        done = self._joining is None or self._joining.done()
        if done and (self._joins < JOINS or (self._joining is not None and not self._joining.cancelled() and (self._joining.exception() or not self._joining.result()))):
            self._joins += 1
            self._joining = asyncio.create_task(self._joined())

    async def __del__(self) -> None:
        # Ray calls this after the replica's last request. The attribute is missing when the constructor raised.
        with contextlib.suppress(AttributeError):
            await asyncio.to_thread(self._core.stop)


def _log_where_serve_logs() -> None:
    """Our lines go where Ray Serve's own go, in its encoding and with the id of the request they belong to."""
    ours, theirs = logging.getLogger("portaisys"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = list(theirs.handlers), False
    ours.setLevel(theirs.level)


async def read_body(request: Request) -> bytes:
    """The whole body. Raises RefusedError (413) as soon as it exceeds the limit, whatever Content-Length says."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise RefusedError(413, f"the body exceeds {MAX_BODY_BYTES} bytes; send fewer samples a request")
    except ClientDisconnect:
        raise RefusedError(400, "the client left before its body was complete") from None
    return bytes(body)


def build_app(args: ServeArgs) -> serve.Application:
    """The application of `serve.run`, or of `import_path: portaisys.serve.app:build_app` in a Serve config.

    A relative storage.path is taken from the folder of the process that builds the application, `~` where it serves.
    """
    storage = args.storage.model_copy(update={"path": _absolute(args.storage.path), "cache": _absolute(args.storage.cache)})
    deployment = serve.deployment(Replica).options(
        name="inference",
        **({"autoscaling_config": args.autoscale.config()} if args.autoscale else {"num_replicas": args.num_replicas}),
        # Well above what runs and waits: what Serve itself holds back waits unseen, the batcher's limit answers 503.
        max_ongoing_requests=4 * args.max_queue,
        max_surge_percent=args.max_surge_percent,
        # A process that is stopped is still sent its share of what comes. Ray gives a replica up after three checks in vain: within 11 s
        # so, against 95 s measured with its defaults (10 and 30).
        health_check_period_s=2,
        health_check_timeout_s=3,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus, "label_selector": args.label_selector},
    )
    # Another number of replicas must not be another version of them: Ray would start all of them afresh.
    return deployment.bind(args.model_copy(update={"storage": storage}).model_dump(mode="json", exclude=_RAYS))


_RAYS = {"num_replicas", "autoscale", "num_cpus", "num_gpus", "label_selector", "max_surge_percent"}


def _absolute(path: str) -> str:
    return path if "://" in path or path.startswith("~") else str(Path(path).resolve())
