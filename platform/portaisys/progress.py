"""What is seen of a training while it goes on: rows between its reports, time left, use of the device, a line of text, a trace of some steps.

Changes nothing that is computed. Knows neither the loop nor where a row is shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile, schedule

from portaisys import models

Row = Mapping[str, float]
Use = Callable[[float, str], Row]

# Peak of a device by the name torch gives it and by precision, in 1e12 floating-point operations a second: dense, 16 bits summed in fp32.
# H100: NVIDIA H100 Tensor Core GPU Architecture (2022), table 2, and the NVL's data sheet; H200: its data sheet, tensor cores as H100's;
# A100: NVIDIA A100 Tensor Core GPU Architecture (2020), table 1; T4, L4: data sheets (L4's are stated with sparsity and halved here);
# RTX: NVIDIA Ada GPU Architecture (2022), appendix A, and RTX Blackwell GPU Architecture (2025), appendix A. Parts of a card (MIG) have other names.
_H100, _NVL = {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4}, {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}
_A100 = {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA H200": _H100,
    "NVIDIA H200 NVL": _NVL,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": {"fp32": 51.2, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0},
    "NVIDIA H100 NVL": _NVL,
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), _A100),
    "NVIDIA L4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0},
    "Tesla T4": {"fp32": 8.1, "fp16": 65.0},
    "NVIDIA GeForce RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2},
    "NVIDIA GeForce RTX 5090": {"fp32": 104.8, "tf32": 104.8, "bf16": 209.5, "fp16": 209.5},
}


class Progress:
    """What fit() tells of between its reports, and the figures that it has not itself.

    `write(row)` gets a row every `every_s` seconds at most, by this process's own clock; without it there are none. `fixed`: figures that
    every row carries; `use(rows_per_s, precision)`: what is known of the device's use; `stepped()`: called after each step. One a fit.
    """

    def __init__(
        self, write: Callable[[Row], None] | None = None, *, fixed: Row | None = None, use: Use = lambda rows_per_s, precision: {}, stepped: Callable[[], None] = lambda: None,
        every_s: float = 2.0, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.write: Callable[[Row], None] = write or (lambda row: None)
        self._wanted, self._fixed, self._use, self._stepped, self._every_s, self._clock = write is not None, dict(fixed or {}), use, stepped, every_s, clock
        self._steps = self._samples = 0
        self._first = self._told = math.nan

    def step(self, samples: int) -> bool:
        """A step of this attempt is done, over so many samples; whether a row is due."""
        self._stepped()
        self._steps, self._samples = self._steps + 1, self._samples + samples
        now = self._clock()
        if self._steps == 1:
            self._first = self._told = now
        return self._wanted and now - self._told >= self._every_s

    def figures(self, steps_left: int, rows_per_s: float, precision: str) -> dict[str, float]:
        """Of a row that is told now. `attempt_*`: what this attempt did; `eta_s` from its rate alone, its first step, which is slower, left out."""
        self._told = self._clock()
        found = {"attempt_steps": self._steps, "attempt_samples": self._samples, **self._fixed, **self._use(rows_per_s, precision)}
        return found | ({"eta_s": steps_left * (self._told - self._first) / (self._steps - 1)} if self._steps > 1 else {})


def recent(losses: Sequence[Tensor], world: int, before: float) -> float:
    """About the mean loss of some steps, from the part of one of `world` ranks, which may not ask the others; `before` without any. Waits for the device."""
    return torch.stack([*losses]).mean().item() * world if losses else before


# --- use of the device --------------------------------------------------------------------------------------------


def training_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """Floating-point operations of both passes over one row of `shape`: three times the forward's (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
    return 3 * 2 * models.count(model, shape)["macs"]


def mfu(flops: float, rows_per_s: float, name: str, precision: str, world: int = 1) -> float | None:
    """Model FLOPs utilization in [0, 1] (same source): what rows of `flops` need a second, of the peak of `world` devices of this name; None where it is not known."""
    peak = PEAK_TFLOPS.get(name, {}).get(precision)
    return flops * rows_per_s / (peak * 1e12 * world) if peak else None


def use_of(model: nn.Module, shape: Sequence[int], device: str, world: int) -> Use:
    """What `Progress` asks of a model on this device; nothing where the device's peak is not known. Only what `model` itself needs is counted: of a distillation, not the teacher."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    if name not in PEAK_TFLOPS:
        return lambda rows_per_s, precision: {}
    flops = training_flops(model, shape)

    def use(rows_per_s: float, precision: str) -> Row:
        found = mfu(flops, rows_per_s, name, precision, world)
        return {} if found is None else {"mfu": found}

    return use


# --- as text ------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row in one line."""
    parts = [f"epoch {row['epoch']:.1f}", f"loss {row['loss']:.3f}"]
    parts += [f"validation {row['validation_accuracy']:.2%}"] if "validation_accuracy" in row else []
    parts += [f"{row['samples_per_s']:,.0f} rows/s"]
    parts += [f"{_span(row['eta_s'])} left"] if row.get("eta_s") else []
    parts += [f"{name} {row[key]:.0%}" for key, name in (("padding_waste", "padding"), ("mfu", "MFU")) if key in row]
    return ", ".join(parts)


def _span(seconds: float) -> str:
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


# --- a trace ------------------------------------------------------------------------------------------------------

WARM_UP = 3  # steps of an attempt that are not traced: they load kernels and fill caches


@contextmanager
def traced(path: Path, steps: int, note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A function to call after each step; with it the `steps` after the first three are traced into `path`, a Chrome trace (.json.gz).

    `note` is told what was traced and where. An attempt that ends sooner leaves what there was.
    """
    if not steps:
        yield lambda: None
        return
    written: list[int] = []

    def keep(found: Any) -> None:
        count = found.step_num - WARM_UP
        if count <= 0 or written:
            return
        written.append(count)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        found.export_chrome_trace(str(draft))
        draft.replace(path)
        note(f"train.profile_steps: {count} steps of rank 0 are in {path.parent.name}/{path.name}; open it at ui.perfetto.dev or chrome://tracing")

    with profile(schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1), on_trace_ready=keep) as profiler:
        yield profiler.step
    if not written:
        note(f"train.profile_steps: nothing was traced: this attempt took {profiler.step_num} steps, and the first {WARM_UP} are not traced")
