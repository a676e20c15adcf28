"""Serve a version from this machine: start Ray Serve (and Ray, where none runs), wait until it answers, stop by our own handle."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator

import ray
from ray import serve

from portaisys.serve.app import ServeArgs, build_app
from portaisys.spec import UserError

APPLICATION = "portaisys"


@contextlib.contextmanager
def serving(args: ServeArgs, *, host: str = "127.0.0.1", port: int = 8000) -> Iterator[str]:
    """The URL of the running application, ready (warm) when the block starts, gone when it ends.

    Raises UserError when the application does not come up; the message is the replica's own.
    """
    _check_free(host, port)
    own = not ray.is_initialized()
    if own:
        ray.init(address="local", num_cpus=max(1, round(args.num_replicas * args.num_cpus)) + 1, include_dashboard=False, log_to_driver=False)
    try:
        _start(args, host, port)
        yield f"http://{host}:{port}"
    finally:
        # Our application alone: serve.shutdown() would end every other one of a cluster that was there before.
        with contextlib.suppress(Exception):  # half-started: there may be no controller to ask
            serve.delete(APPLICATION)
        if own:
            ray.shutdown()


def _start(args: ServeArgs, host: str, port: int) -> None:
    if serve.status().proxies:
        raise UserError("serve: this Ray cluster already runs Serve, on its own port; use serve deploy serve_apps/... there")
    try:
        serve.start(http_options={"host": host, "port": port})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # serve.start has just set it to INFO
        serve.run(build_app(args), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise UserError(f"serve: the application did not start: {_last_line(error)}") from error


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"serve.port: cannot listen on {host}:{port} ({error.strerror}); choose another (serve.port=8001)") from None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else repr(error))


def until_stopped() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
