"""Freed memory stays with the process while it trains on the CPU: glibc otherwise hands a step's activations back to the kernel and fetches zeroed pages for the next.

A small residual CNN spent 12 of 46 ms a step on 7,300 page faults (docs/log.md, 2026-11-28). Changes nothing that is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

# Of malloc.h. Blocks below the first are taken from the heap; the heap's free end above the second goes back to the kernel.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEPT, _USUAL = 1 << 30, (32 << 20, 64 << 20)  # glibc's own thresholds grow to the latter as large blocks are freed


@contextlib.contextmanager
def kept(device: str) -> Iterator[bool]:
    """For the time of the block, where `device` is the CPU and the C library glibc; yields whether it is so. What is free afterwards goes back."""
    libc = _glibc() if device == "cpu" else None
    if libc is None:
        yield False
        return
    _set(libc, _KEPT, _KEPT)
    try:
        yield True
    finally:
        _set(libc, *_USUAL)
        libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, large: int, trim: int) -> None:
    if not libc.mallopt(_M_MMAP_THRESHOLD, large):  # older ones take no more than half a heap of a thread
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL[0])
    libc.mallopt(_M_TRIM_THRESHOLD, trim)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.gnu_get_libc_version else None
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return None
