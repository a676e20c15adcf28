"""The conformance suite finds what it is for: each planted defect of tests/conformance/defects.py fails it, and without one it passes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from conformance import own
from conformance.defects import DEFECTS, PORT_DEFECTS, Proxy

SUITE = Path(__file__).parent / "conformance"
EVERYTHING = tuple(sorted({test for defect in DEFECTS.values() for test in defect.tests}))
SOUND = ("none", "port/none")
Runs = dict[str, Future[subprocess.CompletedProcess[str]]]


def suite(url: str, tests: tuple[str, ...], *options: str) -> subprocess.CompletedProcess[str]:
    """Tests of the suite against a server, in a process of its own as its users run it."""
    nodes = [str(SUITE / f"test_{test.replace('::', '.py::test_')}") for test in tests]
    command = [sys.executable, "-m", "pytest", *nodes, "-q", "-p", "no:cacheprovider", "--url", url, "--model", "linear", "--model", "every", "--tb=line", "--no-header", *options]
    return subprocess.run(command, cwd=SUITE.parent, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """Every run of the suite, two at a time. The longest one goes first."""
    core = own.core()
    route = own.Route(own.route(core))
    proxies = {name: Proxy(core.ports["http"], defect) for name, defect in PORT_DEFECTS.items()}
    with ThreadPoolExecutor(2) as pool:
        handled = {name: (f"http://127.0.0.1:{route.port}/{name}", defect.tests or EVERYTHING) for name, defect in DEFECTS.items()}
        proxied = {f"port/{name}": (f"http://127.0.0.1:{proxies[name].port}", defect.tests) for name, defect in PORT_DEFECTS.items()}
        yield {name: pool.submit(suite, url, tests, *([] if name in SOUND else ["-x"])) for name, (url, tests) in {**handled, **proxied}.items()}
    for proxy in proxies.values():
        proxy.close()
    route.stop()
    core.stop(drain_s=1)


@pytest.mark.parametrize("name", SOUND)
def test_without_a_defect_the_suite_passes(runs: Runs, name: str) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", [*(name for name in DEFECTS if name != "none"), *(f"port/{name}" for name in PORT_DEFECTS if name != "none")])
def test_a_planted_defect_is_found(runs: Runs, name: str) -> None:
    done = runs[name].result()
    assert done.returncode == 1, done.stdout[-3000:]  # 1: tests failed; not "none were chosen", nor a suite that does not load


def test_ten_defects_and_more_are_planted() -> None:
    assert len(DEFECTS) + len(PORT_DEFECTS) - 2 >= 10
