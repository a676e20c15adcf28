"""How many rows a worker can compute at once, found by trying.

The attempts run in a child process with a limit on its memory below the real one: what fails there, even by being killed, harms nobody,
and what fits there leaves room for what a longer run adds. Knows neither models nor data: an attempt is a function of a number of rows.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from portaisys.spec import UserError

Attempt = Callable[[int], object]

MARGIN = 0.2
TIMEOUT_S = 600.0  # of one attempt
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|bad_alloc|bad allocation", re.IGNORECASE)


def find_micro_batch(
    attempt: Attempt, most: int, *, limit_bytes: int, device: str = "cpu", margin: float = MARGIN, agree: Callable[[int], int] = lambda rows: rows
) -> int:  # fmt: skip
    """The most rows, by doubling and at most `most`, that `attempt(rows)` gets through with in `limit_bytes` less `margin` (a fraction).

    `attempt` goes to another process, so it must be importable there: a function of a module, or a `functools.partial` of one. On "cuda"
    the limit is the card's free memory as well. `agree`: the least over all ranks, each of which must call this.
    Raises UserError, on every rank, when one row does not fit somewhere, or an attempt fails of something else than memory.
    """
    fits, problem = _try(attempt, [*_sizes(most)], int(limit_bytes * (1 - margin)), device, margin)
    common = agree(fits)
    if problem:
        raise UserError(f"train.micro_batch: a step cannot be tried: {problem}")
    if not common:
        where = "this worker" if not fits else "another worker"
        raise UserError(
            f"train.micro_batch: a step of one row does not fit {where}'s memory ({limit_bytes / 2**20:.0f} MiB, of which {margin:.0%} are kept free); "
            "make the model or the rows smaller, or have fewer workers on a machine"
        )
    return common


def _sizes(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _try(attempt: Attempt, sizes: list[int], limit_bytes: int, device: str, margin: float) -> tuple[int, str]:
    """The largest size that fits (0: none), and what went wrong that was not memory."""
    context = multiprocessing.get_context("spawn")  # a fork would begin with the parent's memory, and cannot use its GPU
    heard, said = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(attempt, sizes, limit_bytes, device, margin, said), daemon=True)
    child.start()
    said.close()
    fits, problem = 0, ""
    try:
        for size in sizes:
            if not heard.poll(TIMEOUT_S):
                problem = f"{size} rows took longer than {TIMEOUT_S:.0f} s"
                break
            outcome = heard.recv()
            if outcome != FITS:
                problem = "" if outcome == NO_MEMORY else outcome
                break
            fits = size
    except EOFError:  # it ended without a word
        child.join()
        problem = "" if -(child.exitcode or 0) in _KILLED else f"the process that tried it ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()
        heard.close()
    return fits, problem


FITS, NO_MEMORY = "fits", "no memory"
# The kernel's, when there is no memory left; an allocator's, when it was refused some.
_KILLED = {signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS}


def _child(attempt: Attempt, sizes: list[int], limit_bytes: int, device: str, margin: float, said: Connection) -> None:
    outcome = ""
    for size in sizes:
        try:
            if size == sizes[0]:
                _limit(limit_bytes, device, margin)
            attempt(size)
            outcome = FITS
        except Exception as error:
            no_memory = isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error))
            outcome = NO_MEMORY if no_memory else f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        said.send(outcome)
        if outcome != FITS:
            return


def _limit(limit_bytes: int, device: str, margin: float) -> None:
    """Of what is written to, not of addresses (RLIMIT_AS), of which libraries reserve more than they use."""
    if not device.startswith("cuda"):
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    index = torch.device(device).index  # which this function wants, and "cuda" has none
    torch.cuda.set_per_process_memory_fraction(min(free * (1 - margin), limit_bytes) / total, torch.cuda.current_device() if index is None else index)


# --- how much there is ------------------------------------------------------------------------------------------------


def memory_limit(workers: int = 1, device: str = "cpu") -> int:
    """Bytes that each of `workers` processes on this machine may use: what the kernel can give now, or less where a cgroup says so; on "cuda" what the card has free."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0]) // workers
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([available, *_cgroup_bytes()]) // workers


def _cgroup_bytes() -> Iterator[int]:
    """What is left below the limits of cgroups v2 and v1, as a container sees them."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            most, now = ((Path("/sys/fs/cgroup") / name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if most.isdecimal():
            yield max(0, int(most) - int(now))


def least_of_ranks(rows: int, device: str = "cpu") -> int:
    """The least that any rank of a torch.distributed group says; without a group, what is given."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return rows
    said = torch.tensor(rows, device=device)
    dist.all_reduce(said, op=dist.ReduceOp.MIN)
    return int(said)
