"""Which servers and models the suite runs against."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.models import Model, discovered
from conformance.wire import Target

# Defects of ours that are not mended yet: by path, the test that finds one and what it is. A test that passes after all is an error.
KNOWN: dict[str, dict[str, str]] = {"data port": {}, "route": {}}  # test -> why a server of ours is known to fail it
OWN_PATHS, OWN_MODELS = ("data port", "route"), ("linear", "every")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "Open Inference Protocol")
    group.addoption("--url", help="server under test, http://HOST:PORT[/PREFIX]; without it ours is started")
    group.addoption("--grpc", help="its gRPC port, HOST:PORT")
    group.addoption("--model", action="append", help="model to ask, may be repeated; the first of the repository's index by default")


def option(config: pytest.Config, name: str) -> Any:
    """None too where this file was loaded after the command line had been read, as in a run of all tests."""
    return config.getoption(name, default=None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    url, names = option(metafunc.config, "--url"), option(metafunc.config, "--model")
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", ["url"] if url else OWN_PATHS, indirect=True, scope="session")
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", names or (["first"] if url else OWN_MODELS), indirect=True, scope="session")


@pytest.fixture(scope="session")
def ours() -> Iterator[dict[str, str]]:
    """Addresses of a server of ours, in a process of its own."""
    command = [sys.executable, "-m", "conformance.own"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    said = process.stdout.readline()
    assert said, "our own server did not start"
    yield json.loads(said)
    process.stdin.close()  # which it takes for the end
    assert process.wait(30) == 0
    process.stdout.close()


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "url":
        names = option(request.config, "--model") or [None]
        return Target(option(request.config, "--url").rstrip("/"), option(request.config, "--grpc"), names[0])
    ours = request.getfixturevalue("ours")
    return Target(ours[request.param], ours.get("grpc"), OWN_MODELS[0], own_parser=request.param == "data port", known=KNOWN[request.param])


@pytest.fixture(autouse=True)
def known(request: pytest.FixtureRequest) -> None:
    """Expect the failure of tests that a server of ours is known to fail."""
    if "target" in request.fixturenames:
        reason = request.getfixturevalue("target").known.get(request.node.originalname)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest, target: Target) -> Model:
    return discovered(target, target.model if request.param == "first" else request.param)


@pytest.fixture(scope="session")
def first(target: Target) -> Model:
    """One model, for what is not about models."""
    return discovered(target, target.model)
