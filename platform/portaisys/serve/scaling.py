"""How many replicas an application needs: by what its batchers have waiting and how busy its engines are, whichever port it came by.

Ray Serve's own measure counts requests of its route only, which the data port's never are. Each replica reports its load; Ray averages
it over the look-back window, asks `LoadPolicy` and applies the delays and bounds of its own configuration. Knows no engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from portaisys.serve.model import ServedModel

LOAD = "load"


class Autoscale(BaseModel):
    """`target_load`: what a replica should have: 1 is an engine that always runs with nothing waiting; each batch that waits adds one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(ge=1)
    target_load: float = Field(0.7, gt=0)
    look_back_s: float = Field(15.0, ge=1)
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)

    @model_validator(mode="after")
    def _least_below_most(self) -> Autoscale:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} exceeds max_replicas {self.max_replicas}")
        return self

    def config(self) -> dict[str, Any]:
        """As Ray's AutoscalingConfig takes it."""
        return {
            "min_replicas": self.min_replicas, "max_replicas": self.max_replicas, "look_back_period_s": self.look_back_s,
            "upscale_delay_s": self.upscale_delay_s, "downscale_delay_s": self.downscale_delay_s,
            "policy": {"policy_function": "portaisys.serve.scaling:LoadPolicy", "policy_kwargs": {"target_load": self.target_load}},
        }  # fmt: skip


class LoadMeter:
    """A replica's load since it was asked last."""

    def __init__(self) -> None:
        self._asked = time.perf_counter()
        self._seen: dict[int, tuple[ServedModel, float]] = {}  # of each model, which is kept so that its id stays its own

    def read(self, models: Iterable[ServedModel]) -> float:
        """Batches that wait, and the share of the time that engines ran, over all models."""
        models = list(models)
        now, seen = time.perf_counter(), {id(model): (model, model.stats.engine_s / model.batcher.instances) for model in models}
        spent_s = sum(engine_s - self._seen.get(key, (None, 0.0))[1] for key, (_, engine_s) in seen.items())
        busy = min(float(len(models)), spent_s / max(now - self._asked, 1e-6))
        if not busy and any(model.batcher.busy_s() for model in models):
            busy = 1.0  # one batch that is longer than the interval
        self._asked, self._seen = now, seen
        return busy + sum(model.batcher.queued / model.batcher.max_batch for model in models)


class LoadPolicy:
    """So many replicas that each would have the target load. Ray makes one in its controller and calls it every tick."""

    def __init__(self, target_load: float) -> None:
        self._target_load = target_load

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The number wanted, and the state to be handed in the next time: none."""
        loads = (context.aggregated_metrics or {}).get(LOAD, {})
        if not loads:  # nobody has reported yet
            return context.target_num_replicas, {}
        # Those that have not reported yet are taken to have what the others have.
        return sum(loads.values()) / len(loads) * max(context.current_num_replicas, len(loads)) / self._target_load, {}
