"""Training by several processes over gloo: exact shares, restarts with another number of ranks, and decisions that all ranks take alike."""

from __future__ import annotations

import functools
import json
import multiprocessing
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from portaisys import checkpoint, data, distributed, spec
from portaisys.distributed import Place
from portaisys.spec import UserError
from portaisys.train import fit

STEPS = 13  # of an epoch of digits, 797 rows


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(torch.nn.Module):
    """No batch statistics: those of a share are not those of the batch. `overflow`: (label, largest 16-bit type) that overflows."""

    def __init__(self, overflow=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.overflow = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10), overflow

    def forward(self, x):
        y = self.first(x.flatten(1)).relu()
        if self.overflow and y.dtype == torch.bfloat16:
            y = torch.where(x.sum((1, 2, 3))[:, None] > 400, y * 3e38 * 3e38, y)  # a few rows of some batches
        return self.last(y)


class Killed(Exception):
    pass


def rank_main(rank, world, store, job, results):
    """One process of a group; `job(place)` gives what it puts into `results`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        results.put((rank, job(rank, world)))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise
    dist.destroy_process_group()


def group(world, store, job):
    """What each of `world` processes gave, by rank."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["portaisys.train"])  # imported once, not by every rank
    results = server.Queue()
    processes = [server.Process(target=rank_main, args=(rank, world, store, job, results)) for rank in range(world)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    assert all(isinstance(value, dict) for value in found.values()), next(value for value in found.values() if isinstance(value, str))
    return [found[rank] for rank in range(world)]


def trained(rank, world, *, folder, changes, stop=None, overflow=False):
    """Weights, last metrics, notes and rows of each update of one rank; `stop`: die at this step."""
    digits = data.load(spec.Digits())
    options = spec.Train(**{"epochs": 2, "batch_size": 64, "learning_rate": 0.02, "checkpoint_every_steps": 1, "micro_batch": 16, **changes})
    seen, notes, metrics = [], [], {}

    def report(values, saved):
        metrics.update(values)
        if values["step"] == stop:
            raise Killed

    place = Place(rank, world, prepare=functools.partial(distributed.ddp, options=options.ddp) if world > 1 else lambda model: model)
    model, error = Net(overflow), ""
    try:
        fit(model, digits.train, options, folder=folder, key="k", seed=1, report=report, place=place, note=notes.append, audit=lambda step, rows: seen.append((step, rows.tolist())))
    except Killed:
        pass
    except UserError as said:
        error = str(said)
    return {"weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()}, "metrics": metrics, "notes": notes, "rows": seen, "error": error}


def close(a, b, tolerance):
    return all(np.allclose(a["weights"][name], b["weights"][name], rtol=tolerance, atol=tolerance) for name in a["weights"])


def test_restarts_with_4_2_and_3_ranks_see_each_row_once_an_epoch_and_learn_what_one_rank_learns(tmp_path):
    log = []
    for world, stop in ((4, 9), (2, STEPS + 3), (3, None)):
        ranks = group(world, tmp_path / f"store{world}", functools.partial(trained, folder=tmp_path / "run", changes={}, stop=stop))
        log += [entry for rank in ranks for entry in rank["rows"]]
        assert all(rank["weights"] == ranks[0]["weights"] for rank in ranks)
    for epoch in (0, 1):
        rows = sorted(row for step, taken in log for row in taken if step // STEPS == epoch)
        assert rows == list(range(797))
    alone = trained(0, 1, folder=tmp_path / "alone", changes={})
    assert close(ranks[0], alone, 1e-4)
    by_step = {step: sorted(row for one, taken in log for row in taken if one == step) for step in range(2 * STEPS)}
    assert by_step == {step: sorted(rows) for step, rows in alone["rows"]}
    assert ranks[0]["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-4)


OPTIONS = {
    "plain": {}, "small buckets": {"bucket_mib": 0.001}, "copies": {"gradient_as_bucket_view": False}, "static graph": {"static_graph": True},
    "bf16": {"compress": "bf16"},
}  # fmt: skip


def trained_all(rank, world, *, folder):
    """Every DDP option in one group of processes; also 5 rows over accumulated micro-batches, fewer than ranks times parts."""
    return {name: trained(rank, world, folder=folder / name.replace(" ", "-"), changes={"ddp": ddp, "epochs": 1}) for name, ddp in OPTIONS.items()}


def test_every_option_of_ddp_learns_what_one_rank_learns_and_bf16_sends_half(tmp_path):
    first, second = group(2, tmp_path / "store", functools.partial(trained_all, folder=tmp_path))
    alone = trained(0, 1, folder=tmp_path / "alone", changes={"epochs": 1})
    for name in OPTIONS:
        assert close(first[name], second[name], 0) and close(first[name], alone, 0.01 if name == "bf16" else 1e-4), name
    values = 64 * 32 + 32 + 320 + 10
    assert {name: first[name]["metrics"]["exchanged_bytes"] for name in OPTIONS} == {name: values * (2 if name == "bf16" else 4) for name in OPTIONS}
    assert alone["metrics"]["exchanged_bytes"] == 0


def counted(rank, world, *, compress):
    """What a hook counts of the gradients' buckets in one step, and what is said of it."""
    options = spec.Ddp(bucket_mib=0.001)
    model = distributed.ddp(Net(), options)
    sizes = []

    def hook(state, bucket):
        sizes.append(bucket.buffer().nbytes)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
    model(torch.ones(2, 1, 8, 8)).sum().backward()
    return {"counted": sum(sizes), "said": distributed.exchanged_bytes(model.module, options, world)}


def test_the_bytes_said_to_be_exchanged_are_those_of_the_buckets(tmp_path):
    for rank in group(2, tmp_path / "store", functools.partial(counted, compress="none")):
        assert rank["counted"] == rank["said"]


def test_ranks_climb_the_ladder_together_though_only_one_has_the_rows_that_overflow(tmp_path):
    changes = {"precision": "bf16", "epochs": 1}
    first, second = group(2, tmp_path / "store", functools.partial(trained, folder=tmp_path / "run", changes=changes, overflow=True))
    assert first["weights"] == second["weights"] and not first["error"]
    assert first["metrics"]["steps_repeated"] == 3 and first["metrics"]["precision_fallbacks"] == 1
    assert {name: first["metrics"][name] for name in first["metrics"] if "samples_per_s" not in name} == {name: second["metrics"][name] for name in first["metrics"] if "samples_per_s" not in name}
    assert sorted(row for rank in (first, second) for _, taken in rank["rows"] for row in taken) == list(range(797))


def test_ranks_choose_alike(tmp_path):
    changes = {"precision": "auto", "speed": "auto", "epochs": 1}
    first, second = group(2, tmp_path / "store", functools.partial(trained, folder=tmp_path / "run", changes=changes))
    assert first["notes"] == second["notes"] and len(first["notes"]) == 7 and first["weights"] == second["weights"]


def few(rank, world, *, folder):
    """Batches of 1, 2 and 5 rows for 3 ranks: some have none."""
    digits = data.load(spec.Digits())
    plan = [np.arange(1), np.arange(2), np.arange(5), np.arange(7)]
    model = Net()
    place = Place(rank, world, prepare=functools.partial(distributed.ddp, options=spec.Ddp()) if world > 1 else lambda model: model)
    fit(model, digits.train, spec.Train(epochs=2, micro_batch=1, learning_rate=0.01), folder=folder, key="k", batches=lambda epoch: plan, place=place)
    return {"weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()}}


def test_a_rank_without_a_row_takes_part_and_counts_nothing(tmp_path):
    ranks = group(3, tmp_path / "store", functools.partial(few, folder=tmp_path / "run"))
    assert all(rank == ranks[0] for rank in ranks)
    assert close(ranks[0], few(0, 1, folder=tmp_path / "alone"), 1e-4)


def different(rank, world, *, folder):
    return trained(rank, world, folder=Path(f"{folder}-{rank}"), changes={})


def test_workers_that_see_different_checkpoints_do_not_start(digits, tmp_path):
    alone = trained(0, 1, folder=tmp_path / "run-0", changes={}, stop=3)
    assert checkpoint.steps(tmp_path / "run-0") == 3 and json.dumps(alone["metrics"])
    ranks = group(2, tmp_path / "store", functools.partial(different, folder=tmp_path / "run"))
    assert all("the workers see different checkpoints" in rank["error"] for rank in ranks)


def test_batch_statistics_over_ranks_need_gpus():
    with pytest.raises(UserError, match=r"train\.ddp\.sync_batchnorm: torch has it for GPUs only"):
        distributed.ddp(Net(), spec.Ddp(sync_batchnorm=True))
