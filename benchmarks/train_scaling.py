"""What exchanging gradients costs a training step: measured at 1 and 2 ranks over links of several speeds, predicted for others and for 16 GPUs.

    python benchmarks/train_scaling.py --json        # needs root: network namespaces and `tc` (iproute2)
    python benchmarks/train_scaling.py --small       # one model, two rates, two rounds

The platform's own steps (distributed.ddp, train.gradients, train.update) of a transformer and a residual CNN, gloo between two network
namespaces joined by a veth pair, each end's rate capped by a token bucket (`tc tbf`) for real; one thread and one core a rank. Exposed time of an
arm: its step with the exchange less the same step under no_sync, the slower rank of both, in turns. At 1 rank DDP has nobody to wait for; what
it costs there (copies, casts to bf16) is the first term of the model:

    exposed = local (1 rank, measured) + by how much the exchange lengthens the backward pass + buffers (before the forward pass)
    exchange of a bucket = the longer of 2 (n - 1) alpha + 2 (n - 1) / n * bytes / (share * rate) and 2 (n - 1) / n * bytes * work

(Hockney 1994's alpha-beta, ring of Patarasu and Yuan 2009, buckets and overlap of Li et al. 2020, arXiv:2006.15704.) When gradients are there is
measured at 1 rank, without an exchange. Buckets go one after the other, none before its last gradient is there; their `work` is done by the core
that computes: what of it falls into the backward pass is not hidden, what comes after goes on beside the wire. alpha is half of an all-reduce
of one number; share and work are fitted on a few cases alone (`fitted`, marked in the table); errors are of the others.
`wire_over_predicted_bytes`: bytes that both interfaces sent in a block of steps over the exact count, median and range of arms (headers and acknowledgements, at
the interface, so a large segment has one header); `exposed_ms_1rank`, `exposed_ms_2ranks`: of default buckets in fp32 at the middle rate, median and range of rounds;
`prediction_error_max`: of the step time; `exposed_error_max`: of the exposed time, the harder one, over cases where that is at least a tenth of
the step; both as a share of what was measured, `value` the largest, `low` the smallest; `exposed_error_median`: of those cases, and their range.
`predicted_efficiency_16`: **a prediction, not a measurement**, for GPUs that nobody here has: compute time over step time, `low` and `high` with the network share at half and at all of the rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy import optimize

from portaisys import distributed, models, spec
from portaisys.distributed import Place
from portaisys.engine.cpu import device
from portaisys.precision import Ladder
from portaisys.rows import Share
from portaisys.step import Learner, cross_entropy, gradients, make_optimizer, update

MODELS = {
    "transformer": spec.Transformer(name="transformer", patch=4, dim=256, depth=3, heads=4),
    "cnn": spec.ConvNet(channels=(64, 128, 256), blocks=(1, 1, 1), strides=(2, 2, 2)),
}
BATCH = {"transformer": 8, "cnn": 16}  # rows a rank
SHAPE = (1, 28, 28)
BUCKETS_MIB = (25.0, 1.0)  # the default, which holds all of such a model and overlaps nothing, and one that overlaps
RATES_MBIT = (250, 700, 2000)
STEPS = 3  # timed, of a block; one more goes before
ADDRESSES, PORT = ("10.78.0.1", "10.78.0.2"), 29511


@dataclass(frozen=True)
class Arm:
    model: str
    compress: str
    bucket_mib: float

    @property
    def options(self) -> spec.Ddp:
        return spec.Ddp(bucket_mib=self.bucket_mib, compress=self.compress)

    def __str__(self) -> str:
        return f"{self.model}, {'fp32' if self.compress == 'none' else self.compress}, buckets of {self.bucket_mib:g} MiB"


@dataclass(frozen=True)
class Bucket:
    """`ready_ms`: after the start of the backward pass, when the last of its gradients is there; `sent`: bytes given to the exchange."""

    ready_ms: float
    sent: float


@dataclass(frozen=True)
class Case:
    """One arm at one rate. Times in ms: `with_ms`, `without_ms` the exchange, `local_ms` what DDP costs one rank; [rounds]."""

    arm: Arm
    rate_mbit: int
    with_ms: np.ndarray
    without_ms: np.ndarray
    local_ms: float
    backward_ms: float
    buckets: tuple[Bucket, ...]
    buffer_bytes: int
    wire_over_exact: float

    @property
    def exposed_ms(self) -> float:
        return float(np.median(self.with_ms - self.without_ms))


def fitted(case: Case, rates: Sequence[int]) -> bool:
    """What the model is fitted on: one model at the two outer rates, in fp32. Not the other model, the rate between, nor anything in bf16."""
    return case.arm.model == "transformer" and case.arm.compress == "none" and case.rate_mbit in (rates[0], rates[-1])


# --- a rank -----------------------------------------------------------------------------------------------------------


def learner_of(arm: Arm, place: Place) -> Learner:
    torch.manual_seed(0)
    model = models.build(MODELS[arm.model], SHAPE, 10).train()
    options = spec.Train(learning_rate=1e-6, ddp=arm.options)  # so small that ranks which do not exchange stay finite
    return Learner(model, distributed.ddp(model, arm.options), make_optimizer(model, options), Ladder("fp32", "cpu", print), cross_entropy(), options, place)


def block_ms(learner: Learner, share: Share, exchanges: bool) -> float:
    """Milliseconds a step, of the slower rank. DDP hands buffers out in the step after one that exchanged: so the first is not timed."""
    with contextlib.nullcontext() if exchanges else learner.trained.no_sync():
        step(learner, share)
        distributed.total(torch.zeros(1))  # all start together
        started = time.perf_counter()
        for _ in range(STEPS):
            step(learner, share)
        taken = torch.tensor((time.perf_counter() - started) / STEPS * 1e3, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def step(learner: Learner, share: Share) -> None:
    gradients(learner, [share], "fp32")
    assert update(learner, "fp32"), "the numbers of a step are not finite"


def share_of(arm: Arm, rank: int) -> Share:
    rng, rows = np.random.default_rng(rank), BATCH[arm.model]
    return Share(np.arange(rows), torch.from_numpy(rng.normal(size=(rows, *SHAPE)).astype(np.float32)), torch.from_numpy(rng.integers(0, 10, rows)), 1 / dist.get_world_size())


def sent_bytes() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def wire_bytes(learner: Learner, share: Share) -> float:
    """What all interfaces sent in STEPS steps with the exchange, a step."""
    step(learner, share)
    distributed.total(torch.zeros(1))
    before = sent_bytes()
    for _ in range(STEPS):
        step(learner, share)
    distributed.total(torch.zeros(1))
    return float(distributed.total(torch.tensor(float(sent_bytes() - before), dtype=torch.float64))) / STEPS


def buckets_of(learner: Learner) -> list[list[int]]:
    """The parameters of each bucket, as DDP has made them by now."""
    text = learner.trained._get_ddp_logging_data()["rebuilt_per_bucket_param_indices"]  # type: ignore[operator]
    return [[int(index) for index in one.split()] for one in text.split(",")]


def ready_ms(learner: Learner, share: Share, rounds: int = 15) -> tuple[list[float], float]:
    """When each parameter's gradient is there after the backward pass began, and when it ends; medians in ms, on the model without DDP."""
    parameters, at = [*learner.model.parameters()], {}
    handles = [p.register_post_accumulate_grad_hook(lambda _, index=index: at.__setitem__(index, time.perf_counter())) for index, p in enumerate(parameters)]
    found = []
    for _ in range(rounds):
        learner.optimizer.zero_grad(set_to_none=True)
        loss = learner.loss(learner.model(share.x), share.x, share.y)
        started = time.perf_counter()
        loss.backward()
        found.append([*(at[index] - started for index in range(len(parameters))), time.perf_counter() - started])
    for handle in handles:
        handle.remove()
    *each, all_of_it = (np.median(found, axis=0) * 1e3).tolist()
    return each, all_of_it


def message_ms(rounds: int = 300) -> float:
    """What a message takes that holds next to nothing: half of an all-reduce of one number, which is two, one after the other."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        distributed.total(torch.zeros(1))
        found.append(time.perf_counter() - started)
    return float(np.median(found)) * 1e3 / 2


def cap(rate_mbit: int) -> None:
    """What this rank's interface sends a second from now on. The queue is long enough to lose nothing."""
    run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", f"{rate_mbit}mbit", "burst", "128kb", "limit", "16mb")


def rank_main(rank: int, world: int, rates: Sequence[int], arms: Sequence[Arm], rounds: int) -> None:
    """Measure every arm at every rate in turns; rank 0 prints what it found, a line of JSON each."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    dist.init_process_group("gloo", init_method=f"tcp://{ADDRESSES[0]}:{PORT}", rank=rank, world_size=world)
    place = Place(rank=rank, world=world)
    learners = {arm: (learner_of(arm, place), share_of(arm, rank)) for arm in arms}
    for learner, share in learners.values():
        for _ in range(3):
            step(learner, share)  # DDP makes its buckets anew after the first
    facts = [about(arm, *learners[arm], world) for arm in arms]
    alpha_ms = message_ms() if world > 1 else 0.0
    rng, found = np.random.default_rng(0), []
    for turn in range(rounds + 1):  # the first warms up
        for rate in rng.permutation(rates):
            cap(int(rate))
            for index in rng.permutation(len(arms)):
                order = (True, False) if turn % 2 else (False, True)
                ms = {exchanges: block_ms(*learners[arms[index]], exchanges) for exchanges in order}
                found += [{"arm": int(index), "rate": int(rate), "with": ms[True], "without": ms[False]}] if turn else []
    if rank == 0:
        print(json.dumps({"facts": facts, "found": found, "alpha_ms": alpha_ms}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def about(arm: Arm, learner: Learner, share: Share, world: int) -> dict[str, Any]:
    ready, backward = ready_ms(learner, share) if world == 1 else ([], 0.0)
    sizes = [p.numel() * (2 if arm.compress == "bf16" else 4) for p in learner.model.parameters()]
    buckets = buckets_of(learner)
    return {
        "ready": [max(ready[index] for index in bucket) for bucket in buckets] if ready else [],
        "backward": backward,
        "sent": [sum(sizes[index] for index in bucket) for bucket in buckets],
        "buffers": sum(buffer.nbytes for buffer in learner.model.buffers()),
        "exchanged": distributed.exchanged_bytes(learner.model, arm.options, world),
        "wire": wire_bytes(learner, share) if world > 1 else 0.0,
    }


# --- the link ---------------------------------------------------------------------------------------------------------


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def link() -> Iterator[list[str]]:
    """Names of two network namespaces that see nothing but each other."""
    names = [f"ps{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            # BBR, where it is the default, goes on for a while at the rate that it had measured before.
            run("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno")
        yield names
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"this benchmark needs `ip` and `tc` (iproute2) and leave to make network namespaces: {getattr(error, 'stderr', '') or error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ranks(names: Sequence[str], plan: dict[str, Any]) -> dict[str, Any]:
    """Start a rank in each of these namespaces; what rank 0 says in the end."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    commands = [["ip", "netns", "exec", name, sys.executable, __file__, "--rank", json.dumps(plan | {"rank": rank, "world": len(names)})] for rank, name in enumerate(names)]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        said = [process.communicate()[0] for process in started]
        assert not any(process.returncode for process in started), "a rank failed; its error stands above"
        return json.loads(said[0].splitlines()[-1])
    finally:
        for process in started:
            process.kill()


def measured(arms: Sequence[Arm], rates: Sequence[int], rounds: int) -> tuple[list[Case], dict[str, Any], float]:
    """Every case, what 1 rank took, and alpha in ms."""
    plan = {"arms": [vars(arm) for arm in arms], "rates": list(rates), "rounds": rounds}
    with link() as names:
        alone = ranks(names[:1], plan | {"rates": list(rates[:1]), "rounds": 2 * rounds})
        both = ranks(names, plan)
    return [case_of(index, arm, rate, alone, both) for index, arm in enumerate(arms) for rate in rates], alone, both["alpha_ms"]


def case_of(index: int, arm: Arm, rate: int, alone: dict[str, Any], both: dict[str, Any]) -> Case:
    single, fact, here = alone["facts"][index], both["facts"][index], times(both, index, rate)
    one = times(alone, index, alone["found"][0]["rate"])
    slower = float(np.median(here[1]) / np.median(one[1]))  # two ranks share the memory: the backward pass takes that much longer
    assert single["sent"] == fact["sent"], "1 rank and 2 have other buckets"
    buckets = tuple(Bucket(ready * slower, sent) for ready, sent in zip(single["ready"], fact["sent"], strict=True))
    exact = 2 * sum(fact["sent"]) + fact["buffers"]  # a ring of 2 sends each gradient byte twice, one rank the buffers
    assert fact["exchanged"] == sum(fact["sent"]) + fact["buffers"], "distributed.exchanged_bytes counts otherwise"
    return Case(arm, rate, *here, max(0.0, float(np.median(one[0] - one[1]))), single["backward"] * slower, buckets, fact["buffers"], fact["wire"] / exact)


def times(said: dict[str, Any], index: int, rate: int) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in said["found"] if (row["arm"], row["rate"]) == (index, rate)]
    return np.array([row["with"] for row in rows]), np.array([row["without"] for row in rows])


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """`alpha_ms`: a message; `share`: of the rate that payload gets; `work_ms_mb`: of the rank's own core, for a million bytes sent."""

    alpha_ms: float
    share: float
    work_ms_mb: float


def exposed(case: Case, link: Link, world: int = 2) -> float:
    """Predicted, in ms."""
    ring = 2 * (world - 1) / world
    wire = [ring * bucket.sent * 8e-3 / (link.share * case.rate_mbit) + 2 * (world - 1) * link.alpha_ms for bucket in case.buckets]
    work = [ring * bucket.sent / 1e6 * link.work_ms_mb for bucket in case.buckets]
    buffers = case.buffer_bytes and link.alpha_ms + case.buffer_bytes * 8e-3 / (link.share * case.rate_mbit)
    return case.local_ms + tail([bucket.ready_ms for bucket in case.buckets], wire, work, case.backward_ms) + buffers


def tail(ready_ms: Sequence[float], wire_ms: Sequence[float], work_ms: Sequence[float], backward_ms: float) -> float:
    """By how much a queue of exchanges lengthens the backward pass: what is left of it when that ends, and the core's time that it took until then."""
    end = taken = 0.0
    for ready, wire, work in zip(ready_ms, wire_ms, work_ms, strict=True):
        end = max(end, ready + taken) + max(wire, work)
        taken += work if end < backward_ms + taken else 0.0
    return max(end, backward_ms + taken) - backward_ms


def fit(cases: Sequence[Case], alpha_ms: float) -> Link:
    """By least squares of the error over the exposed time, or over a tenth of the step where that is more."""
    scale = [max(case.exposed_ms, 0.1 * float(np.median(case.with_ms))) for case in cases]

    def misses(values: np.ndarray) -> list[float]:
        return [(exposed(case, Link(alpha_ms, *values)) - case.exposed_ms) / one for case, one in zip(cases, scale, strict=True)]

    return Link(alpha_ms, *optimize.least_squares(misses, [0.9, 1.0], bounds=([0.3, 0], [1.0, 50]), x_scale=[0.1, 1.0]).x.tolist())


def errors(cases: Sequence[Case], link: Link) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the measured step and of the measured exposed time; the latter where it is a tenth of the step or more."""
    miss = np.array([abs(exposed(case, link) - case.exposed_ms) for case in cases])
    steps, apart = np.array([np.median(case.with_ms) for case in cases]), np.array([case.exposed_ms for case in cases])
    return miss / steps, (miss / apart)[apart >= 0.1 * steps]


def show(cases: Sequence[Case], link: Link, rates: Sequence[int]) -> None:
    print("                                           rate  bytes a step  messages    step ms   exposed ms (of rounds)   predicted   of exposed   of step")
    for case in cases:
        apart, step, said = case.with_ms - case.without_ms, float(np.median(case.with_ms)), exposed(case, link)
        sent, off = sum(bucket.sent for bucket in case.buckets) + case.buffer_bytes, said - case.exposed_ms
        print(
            f"{case.arm!s:40s} {case.rate_mbit:5d}M {sent:12,.0f}  {2 * len(case.buckets) + (case.buffer_bytes > 0):8d} {step:10.1f} {case.exposed_ms:8.1f} ({apart.min():.1f} to {apart.max():.1f})"
            f"{'':4s}{said:8.1f} {off / case.exposed_ms:12.1%} {off / step:9.1%}{'  fitted' if fitted(case, rates) else ''}"
        )


# --- 16 GPUs ----------------------------------------------------------------------------------------------------------


def cluster_step_ms(o: argparse.Namespace, share: float) -> tuple[float, float]:
    """Compute and predicted step in ms. Rings in two stages: reduce-scatter in the node, all-reduce between nodes of a part a GPU, all-gather in the node."""
    g, n = o.gpus_a_node, o.nodes
    bytes_ms = lambda gbyte_s: gbyte_s * 1e6  # noqa: E731
    count = max(1, round(o.gradient_mb / o.bucket_mb))
    part = o.gradient_mb * 1e6 / count
    inside = 2 * (g - 1) / g * part / bytes_ms(o.node_gbyte_s * share) + 2 * (g - 1) * o.alpha_node_us / 1e3
    # All GPUs of a node send their parts at once through what the node has of network: together, one bucket.
    between = 2 * (n - 1) / n * part / bytes_ms(o.network_gbit_s / 8 * share) + 2 * (n - 1) * o.alpha_network_us / 1e3
    backward = o.compute_ms * o.backward_share
    return o.compute_ms, o.compute_ms + tail([backward * (index + 1) / count for index in range(count)], [inside + between] * count, [0.0] * count, backward)


def predict(options: argparse.Namespace) -> dict[str, float]:
    """Print every input and what follows."""
    print(f"\n{options.nodes * options.gpus_a_node} GPUs on {options.nodes} nodes: a prediction, not a measurement. Not in it: stragglers, other traffic, loading, SM time that the exchange takes.")
    for name in CLUSTER:
        print(f"  --{name.replace('_', '-'):18s} {getattr(options, name):<8g} {CLUSTER[name][1]}")
    found = {}
    for name, share in (("value", options.network_share), ("low", options.network_share / 2), ("high", 1.0)):
        compute, step = cluster_step_ms(options, share)
        found[name] = compute / step
        print(f"  at {share:.2f} of the rates: step {step:.1f} ms, of which {step - compute:.2f} exposed: efficiency {found[name]:.3f}")
    for rate in (10, 25, 100, 400):
        compute, step = cluster_step_ms(argparse.Namespace(**vars(options) | {"network_gbit_s": rate}), options.network_share)
        print(f"  at {rate} Gbit/s a node: efficiency {compute / step:.3f}")
    return found


# Default and where it is from. NCCL's numbers: github.com/NVIDIA/nccl, src/graph/tuning.cc (2.8), ring, protocol Simple.
CLUSTER: dict[str, tuple[Any, str]] = {
    "nodes": (4, "as asked"),
    "gpus_a_node": (4, "as asked"),
    "compute_ms": (103.6, "ResNet-50 v1.5, 256 pictures a GPU at 2,470 a second: one A100 80GB, mixed precision, NVIDIA DeepLearningExamples"),
    "backward_share": (0.667, "of compute: two products for each one of the forward pass"),
    "gradient_mb": (102.2, "25,557,032 parameters of ResNet-50 in fp32"),
    "bucket_mb": (26.2, "train.ddp.bucket_mib, 25"),
    "node_gbyte_s": (235.0, "what NCCL reckons with for a ring over NVLink 3; PCIe 4 x16: 25 or so"),
    "network_gbit_s": (100.0, "assumed: one port of 100 Gbit/s a node"),
    "network_share": (0.8, "assumed: of both rates, what payload gets"),
    "alpha_node_us": (3.4, "a message between GPUs over NVLink, NCCL"),
    "alpha_network_us": (9.6, "a message between nodes, NCCL"),
}


def middle(values: np.ndarray) -> dict[str, float]:
    return {"value": float(np.median(values)), "low": float(np.min(values)), "high": float(np.max(values))}


def figures_of(cases: Sequence[Case], link: Link, rates: Sequence[int], alone: dict[str, Any]) -> dict[str, dict[str, float]]:
    others = [case for case in cases if not fitted(case, rates)]
    step_errors, exposed_errors = errors(others, link)
    usual = next(case for case in cases if case.arm == Arm("transformer", "none", BUCKETS_MIB[0]) and case.rate_mbit == rates[len(rates) // 2])
    with_ms, without_ms = times(alone, 0, alone["found"][0]["rate"])
    spread = lambda values: {"value": float(values.max()), "low": float(values.min()), "high": float(values.max())}  # noqa: E731
    return {
        "wire_over_predicted_bytes": middle(np.array([case.wire_over_exact for case in cases])),
        "exposed_ms_1rank": middle(with_ms - without_ms),
        "exposed_ms_2ranks": middle(usual.with_ms - usual.without_ms),
        "prediction_error_max": spread(step_errors),
        "exposed_error_max": spread(exposed_errors),
        "exposed_error_median": middle(exposed_errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true", help="one model, two rates, two rounds")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # a rank started by this script: its plan
    for name, (value, text) in CLUSTER.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{text} (default %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # namespaces outlive whoever made them
    if options.rank:
        plan = json.loads(options.rank)
        rank_main(plan["rank"], plan["world"], plan["rates"], [Arm(**arm) for arm in plan["arms"]], plan["rounds"])
        return
    rates = (RATES_MBIT[0], RATES_MBIT[-1]) if options.small else RATES_MBIT
    arms = [Arm(model, compress, mib) for model in (["transformer"] if options.small else MODELS) for compress in ("none", "bf16") for mib in BUCKETS_MIB]
    print(f"{device()}, {os.cpu_count()} CPUs, one thread a rank, torch {torch.__version__}, python {platform.python_version()}, Linux {platform.release()}")
    cases, alone, alpha_ms = measured(arms, rates, 2 if options.small else options.rounds)
    link = fit([case for case in cases if fitted(case, rates)], alpha_ms)
    show(cases, link, rates)
    print(f"measured: alpha {link.alpha_ms:.3f} ms a message; fitted: payload {link.share:.3f} of the rate, {link.work_ms_mb:.2f} ms of a core a MB")
    figures = figures_of(cases, link, rates, alone) | {"predicted_efficiency_16": predict(options)}
    for name, figure in figures.items():
        print(f"{name}: {figure['value']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})")
    if options.json:
        print(json.dumps({"benchmark": "train_scaling", "figures": figures}))


if __name__ == "__main__":
    main()
