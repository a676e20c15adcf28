"""What kind of CPU this is: engines built or judged on one kind are not taken for another's."""

from __future__ import annotations

import platform
from pathlib import Path

# What decides which integer kernels run, best first: (flag in /proc/cpuinfo, name of the device class).
_CPU_CLASSES = (("amx_int8", "amx_int8"), ("avx512_vnni", "avx512_vnni"), ("avx_vnni", "avx2_vnni"), ("avx512bw", "avx512"), ("avx2", "avx2"))


def device(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Device class: "cpu-avx512_vnni", "cpu-avx512", "cpu-avx2", ...; "cpu-aarch64" or the like where x86's names do not apply."""
    try:
        flags = set(cpuinfo.read_text().split())
    except OSError:
        flags = set()
    return "cpu-" + next((name for flag, name in _CPU_CLASSES if flag in flags), platform.machine() or "unknown")
