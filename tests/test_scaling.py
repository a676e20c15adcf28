"""How many replicas a load needs: what a replica says of itself, what the policy makes of it, and what Ray makes of the policy."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.autoscaling_state import _apply_autoscaling_config, _resolve_policy_callable
from ray.serve.config import AutoscalingConfig
from test_http import rows, served
from test_protocol import Held

from portaisys.serve.app import ServeArgs, build_app
from portaisys.serve.scaling import LOAD, Autoscale, LoadMeter, LoadPolicy


def context(loads: dict[str, float], *, replicas: int, wanted: int | None = None) -> Any:
    return SimpleNamespace(aggregated_metrics={LOAD: loads} if loads else {}, current_num_replicas=replicas, target_num_replicas=wanted or replicas)


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [([0.7], 1), ([0.1], 1), ([0.7, 0.7], 2), ([0.1, 0.1, 0.1, 0.1], 1), ([1.0], 2), ([1.0, 3.2], 6), ([0.0, 0.0], 0)],
)
def test_each_replica_is_to_have_the_target_load(loads: list[float], wanted: int) -> None:
    named = {str(number): load for number, load in enumerate(loads)}
    number, state = LoadPolicy(0.7)(context(named, replicas=len(loads)))
    assert math.ceil(round(number, 9)) == wanted and state == {}


def test_replicas_that_have_not_reported_are_taken_to_have_what_the_others_have() -> None:
    assert LoadPolicy(0.5)(context({"a": 1.0}, replicas=2))[0] == 4


def test_before_anybody_reported_nothing_changes() -> None:
    assert LoadPolicy(0.7)(context({}, replicas=2, wanted=3))[0] == 3


@pytest.mark.parametrize(("delay_s", "wanted"), [(0, 5), (60, 1)])
def test_ray_takes_the_policy_by_its_name_and_applies_its_own_delays(delay_s: float, wanted: int) -> None:
    config = AutoscalingConfig(**Autoscale(max_replicas=8, upscale_delay_s=delay_s).config())
    config.policy.serialize_policy()
    asked = context({"a": 3.0}, replicas=1)
    asked.policy_state, asked.config, asked.capacity_adjusted_min_replicas, asked.capacity_adjusted_max_replicas = {}, config, 1, 8
    assert _apply_autoscaling_config(_resolve_policy_callable(config.policy))(asked)[0] == wanted


def test_what_waits_and_an_engine_that_runs_are_a_replicas_load() -> None:
    engine = Held()
    model, meter = served("tiny", "3", engine), LoadMeter()

    async def scene() -> None:
        assert meter.read([model]) == 0
        tasks = [asyncio.create_task(model.infer({"x": rows(8, seed)})) for seed in range(3)]
        while not model.batcher.busy_s():
            await asyncio.sleep(0)
        assert meter.read([model]) == 3  # one runs, two batches wait
        engine.go.set()
        await asyncio.gather(*tasks)
        assert 0 < meter.read([model]) <= 1
        assert meter.read([model]) == 0
        await model.close()

    asyncio.run(scene())


def test_a_model_that_left_does_not_make_the_load_negative() -> None:
    meter, model = LoadMeter(), served("tiny", "3")
    model.stats.engine_s = 50.0
    meter.read([model])
    assert meter.read([]) == 0


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"num_replicas": 2, "autoscale": {"max_replicas": 3}}, "num_replicas and autoscale both say"),
        ({"autoscale": {"min_replicas": 4, "max_replicas": 3}}, "min_replicas 4 exceeds max_replicas 3"),
        ({"autoscale": {"max_replicas": 3, "target": 1}}, "target"),
        ({"instances": 0}, "instances"),
        ({"memory_mib": 0}, "memory_mib"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ServeArgs(model="digits@production", **args)


def test_the_application_asks_for_a_share_of_a_gpu_and_for_as_many_replicas_as_the_load_needs() -> None:
    app = build_app(ServeArgs(model="digits@production", num_gpus=0.25, autoscale=Autoscale(max_replicas=3)))
    deployment = app._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 0.25
    config = deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.policy.policy_kwargs) == (1, 3, {"target_load": 0.7})
