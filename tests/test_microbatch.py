"""The micro-batch finder: real child processes, real limits."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from portaisys.microbatch import find_micro_batch, least_of_ranks, memory_limit
from portaisys.spec import UserError

MIB = 2**20


def takes(mib_per_row, rows):
    bytearray(rows * mib_per_row * MIB)


# What a child imports is what it waits for: torch only where it is needed.
def torch_takes(mib_per_row, rows):
    import torch

    torch.ones(rows * mib_per_row * MIB // 4).sum().item()


def is_killed_beyond(most, rows):
    if rows > most:
        os.kill(os.getpid(), signal.SIGKILL)


def is_wrong(rows):
    raise TypeError("no such layer")


def ends(rows):
    os._exit(3)


def test_it_finds_the_largest_power_of_two_that_fits_and_this_process_goes_on():
    found = find_micro_batch(partial(takes, 64), 1024, limit_bytes=1000 * MIB, margin=0.2)
    assert found in (4, 8)  # 12.5 times 64 MiB, less what a Python process has


def test_torch_out_of_memory_on_a_cpu_is_understood():
    found = find_micro_batch(partial(torch_takes, 128), 1024, limit_bytes=2500 * MIB, margin=0.2)
    assert 1 <= found < 2000 / 128


def test_a_larger_margin_never_finds_more():
    attempt = partial(takes, 64)
    assert find_micro_batch(attempt, 1024, limit_bytes=1500 * MIB, margin=0.75) < find_micro_batch(attempt, 1024, limit_bytes=1500 * MIB, margin=0.0)


def test_a_child_that_the_kernel_kills_did_not_fit():
    assert find_micro_batch(partial(is_killed_beyond, 5), 64, limit_bytes=memory_limit()) == 4


def test_it_never_finds_more_than_the_batch_and_tries_the_batch_itself():
    assert find_micro_batch(partial(is_killed_beyond, 1000), 24, limit_bytes=memory_limit()) == 24


@pytest.mark.parametrize(("attempt", "message"), [(is_wrong, "TypeError: no such layer"), (ends, "ended with 3")])
def test_a_step_that_fails_of_something_else_is_told(attempt, message):
    with pytest.raises(UserError, match=rf"train\.micro_batch: a step cannot be tried.*{message}"):
        find_micro_batch(attempt, 8, limit_bytes=memory_limit())


def test_a_row_that_does_not_fit_is_refused_with_what_to_change():
    with pytest.raises(UserError, match=r"train\.micro_batch: a step of one row does not fit this worker's memory \(1000 MiB, of which 20%"):
        find_micro_batch(partial(takes, 2000), 8, limit_bytes=1000 * MIB)


def test_all_ranks_take_the_least_and_all_refuse_when_one_has_no_room():
    assert find_micro_batch(partial(is_killed_beyond, 100), 64, limit_bytes=memory_limit(), agree=lambda rows: min(rows, 16)) == 16
    with pytest.raises(UserError, match="another worker's memory"):
        find_micro_batch(partial(is_killed_beyond, 100), 64, limit_bytes=memory_limit(), agree=lambda rows: 0)


def rank(number, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=number, world_size=2)
    found = find_micro_batch(partial(is_killed_beyond, 4 + 8 * number), 64, limit_bytes=memory_limit(2), agree=least_of_ranks)
    (folder / str(number)).write_text(str(found))
    dist.destroy_process_group()


def test_two_real_ranks_with_different_room_agree(tmp_path):
    import torch.multiprocessing

    torch.multiprocessing.spawn(rank, (tmp_path,), nprocs=2)
    assert [(tmp_path / str(number)).read_text() for number in range(2)] == ["4", "4"]


def test_without_a_group_a_rank_is_its_own_least():
    assert least_of_ranks(7) == 7


def test_memory_is_shared_among_the_workers_of_a_machine():
    assert 0 < memory_limit(4) <= memory_limit() / 2
