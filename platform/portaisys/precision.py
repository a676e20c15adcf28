"""What arithmetic a training step is computed in, and what is done when its numbers are not finite.

    fp16: skip the update, halve the scale, same step again     while the forward pass is finite and the scale above 1
    any but fp32: same step again in fp32                        the third time within 100 steps the rest falls back (fp16: bf16, else fp32)
    fp32: leave the step out                                     the third time within 100 steps stop, naming the layer

Knows models, not data and not the loop; every decision depends on numbers that all ranks share.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from portaisys.spec import UserError

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# --- what there is ------------------------------------------------------------------------------------------------


def refuse_unsupported(precision: str, device: str) -> None:
    """Raise UserError when this device does not have the precision."""
    if precision != "auto" and precision not in (found := supported(device)):
        raise UserError(f"train.precision: {precision} is not to be had on {_name(device)}; take {', '.join(found)}, or auto")


def supported(device: str) -> list[str]:
    """Precisions a step can be computed in on this device, fp32 first; each 16-bit one has been tried on a small layer."""
    cuda = device.startswith("cuda")
    tf32 = ["tf32"] if cuda and torch.cuda.get_device_capability(device) >= (8, 0) else []
    return ["fp32", *tf32, *(name for name in _TYPES if _runs(name, device))]


@functools.cache
def _runs(precision: str, device: str) -> bool:
    if device.startswith("cuda") and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 8)).to(device)
    try:
        with torch.random.fork_rng(), autocast(precision, device):
            layers(torch.randn(2, 8, 4, 4, device=device)).float().sum().backward()
    except RuntimeError:
        return False
    return True


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"this {device}"


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """For the forward pass and the loss: matrix products in 16 bits where the precision says so, weights as they are."""
    return torch.autocast(device.partition(":")[0], _TYPES[precision]) if precision in _TYPES else nullcontext()


@contextmanager
def products(precision: str, device: str) -> Iterator[None]:
    """For both passes: whether fp32 products of a GPU may be rounded to TF32: in `tf32` alone. Islands of a 16-bit run are fp32 as they say, convolutions included, unlike torch's default."""
    if not device.startswith("cuda"):
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def islands(model: nn.Module, names: Sequence[str], device: str) -> Iterator[None]:
    """The modules of these names, and all below them, compute in fp32 within the block: autocast is off in them and inputs are cast.

    Raises UserError for a name that no module has. Hooks, not a patched forward: those would tie a copy of the model to the original.
    """
    found = dict(model.named_modules())
    for name in names:
        if not any(_below(module, name) for module in found):
            near = difflib.get_close_matches(name, found, n=3, cutoff=0.3) or list(found)[1:4]
            raise UserError(f"train.fp32_modules: no module of the model is called {name!r}; there are {', '.join(near)}, ...")
    open_blocks: list[AbstractContextManager[Any]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        open_blocks.append(torch.autocast(device.partition(":")[0], enabled=False))
        open_blocks[-1].__enter__()
        return tuple(map(_full, args)), {key: _full(value) for key, value in kwargs.items()}

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_blocks.pop().__exit__(None, None, None)

    handles = []
    for module in (module for path, module in found.items() if any(_below(path, name) for name in names)):
        handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _below(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# --- the ladder ---------------------------------------------------------------------------------------------------

LIMIT, WINDOW = 3, 100  # so many within so many steps are no accident
RUNGS = ("scale_lowered", "steps_repeated", "precision_fallbacks", "steps_skipped")


class Ladder:
    """The precision of a run's steps. `counts`: how often each rung was taken; `note` is told what a user should know."""

    def __init__(self, precision: str, device: str, note: Callable[[str], None]) -> None:
        self.precision, self.device, self._note = precision, device, note
        self.scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=device.partition(":")[0] in ("cuda", "cpu"))
        self.counts = dict.fromkeys(RUNGS, 0)
        self._repeated: list[int] = []
        self._skipped: list[int] = []
        self._scale_of: tuple[int, float] = (-1, 1.0)  # the scale that a step was tried with first

    def climb(self, step: int, tried: str, overflowed: bool, why: Callable[[], str]) -> str | None:
        """The gradients of `step`, computed in `tried`, are not finite: the precision to compute it in again, None to leave it out.

        `overflowed`: the forward pass already did, on some rank, which another scale does not help. Raises UserError when too many were left out; `why` then says where the numbers overflowed.
        """
        if tried == "fp16":
            scale = self.scaler.get_scale()
            if self._scale_of[0] != step:
                self._scale_of = (step, scale)
            lower = not overflowed and scale > 1
            # It forgets what it saw of this attempt. Where no scale helps, the cause is another, and steps to come keep theirs.
            self.scaler.update(scale / 2 if lower else self._scale_of[1])
            if lower:
                self.counts["scale_lowered"] += 1
                return "fp16"
        if tried != "fp32":
            return self._repeat(step, tried)
        self._leave_out(step, why)
        return None

    def _repeat(self, step: int, tried: str) -> str:
        self.counts["steps_repeated"] += 1
        self._repeated = _recent(self._repeated, step)
        if len(self._repeated) >= LIMIT:
            self.precision = "bf16" if tried == "fp16" and "bf16" in supported(self.device) else "fp32"
            self._repeated = []
            self.counts["precision_fallbacks"] += 1
            self._note(f"train.precision: {LIMIT} steps of the last {WINDOW} overflowed in {tried}, so from step {step + 1} on it is {self.precision}")
        return "fp32"

    def _leave_out(self, step: int, why: Callable[[], str]) -> None:
        self.counts["steps_skipped"] += 1
        self._skipped = _recent(self._skipped, step)
        if len(self._skipped) >= LIMIT:
            raise UserError(
                f"train: gradients are not finite in fp32, for {LIMIT} of the last {WINDOW} steps, by step {step + 1}; {why()}; "
                "lower train.learning_rate, set train.clip_norm, or look at the rows for values that are not finite"
            )
        self._note(f"step {step + 1} was left out: its gradients are not finite even in fp32")

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"precision": self.precision, "counts": dict(self.counts), "repeated": list(self._repeated), "skipped": list(self._skipped), "scaler": self.scaler.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.precision, self._repeated, self._skipped = state["precision"], list(state["repeated"]), list(state["skipped"])
        self.counts = dict.fromkeys(RUNGS, 0) | dict(state["counts"])
        self.scaler.load_state_dict(state["scaler"])


def _recent(steps: list[int], step: int) -> list[int]:
    return [*(one for one in steps if step - WINDOW < one != step), step]


def first_overflow(model: nn.Module, forward: Callable[[], object]) -> str:
    """Which layer's output is the first that is not finite when `forward` runs the model once more; empty when all are."""
    seen: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not seen and isinstance(output, Tensor) and not output.isfinite().all():
            size = max((float(arg.detach().abs().max()) for arg in args if isinstance(arg, Tensor) and arg.numel()), default=math.nan)
            weights = all(bool(p.isfinite().all()) for p in module.parameters(recurse=False))
            seen.append(f"the first output that is not finite is that of {name} ({type(module).__name__}), whose inputs reach {size:.3g}{'' if weights else ' and whose weights are not finite'}")

    # Inner modules end before those that hold them, so the first one told of is the innermost.
    handles = [module.register_forward_hook(functools.partial(look, name or "the model")) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else ""
