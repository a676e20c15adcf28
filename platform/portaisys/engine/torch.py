"""torch behind the Engine interface, eager or through torch.compile: what other engines are compared with, offline only.

It is handed a callable, a module in evaluation mode as a rule: a model's code belongs to the offline half, which no engine
imports. There is nothing to build or to cache, so it is not in the table of backends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from portaisys.engine import Arrays, Tensor, check_feeds
from portaisys.spec import UserError

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """`call` takes a tensor an input, in order, and gives a tensor, a sequence or a mapping of one an output.

    `compiled`: through torch.compile, which costs seconds at the first run of a batch size or two. `precision`: fp32, or bf16 and fp16
    by autocast. Threads are torch's own, of the whole process. Raises UserError for a precision that autocast has not.
    """

    backend = "torch"

    def __init__(
        self, call: Callable[..., Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, compiled: bool = False, precision: str = "fp32", device: str = "cpu"
    ) -> None:
        if precision not in ("fp32", *LOW):
            raise UserError(f"torch: {precision!r} is not one of fp32, {', '.join(LOW)}")
        self.precision, self.device, self.inputs, self.outputs = precision, device, tuple(inputs), tuple(outputs)
        self._call = torch.compile(call) if compiled else call

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs for a batch of inputs. Raises UserError for wrong feeds, or when torch.compile finds no C++ compiler."""
        check_feeds(self.inputs, feeds)
        given = [torch.from_numpy(np.ascontiguousarray(feeds[tensor.name])).to(self.device) for tensor in self.inputs]
        with torch.inference_mode(), self._arithmetic():
            try:
                made = self._call(*given)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                raise UserError(f"torch.compile cannot compile this model here: {str(error).strip().splitlines()[0]} (on a CPU it needs g++)") from error
        return {tensor.name: _array(found, tensor) for tensor, found in zip(self.outputs, _listed(made, self.outputs), strict=True)}

    def close(self) -> None:
        """Let go of the callable."""
        self._call = None  # type: ignore[assignment]

    def _arithmetic(self) -> Any:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.partition(":")[0], LOW[self.precision])


def _listed(made: Any, outputs: Sequence[Tensor]) -> list[Any]:
    if isinstance(made, Mapping):
        return [made[tensor.name] for tensor in outputs]
    return list(made) if isinstance(made, (tuple, list)) else [made]


def _array(found: Any, tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = found.float().cpu().numpy() if found.is_floating_point() else found.cpu().numpy()
    return array.astype(tensor.dtype, copy=False)
