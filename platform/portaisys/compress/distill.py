"""Knowledge distillation: a loss that listens to a teacher, handed to the one training loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portaisys.spec import Distill
from portaisys.step import Loss


def distillation(teacher: nn.Module, options: Distill) -> Loss:
    """alpha * T^2 * KL(teacher || student) at temperature T + (1 - alpha) * cross entropy.

    Hinton et al. 2015, arXiv:1503.02531, section 2: T^2 keeps the soft gradients' size when T changes. The teacher
    sees the same augmented rows as the student.
    """
    teacher.eval().requires_grad_(False)
    T = options.temperature

    def loss(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with torch.inference_mode():
            soft = F.log_softmax(teacher(x).float() / T, 1)
        kl = F.kl_div(F.log_softmax(logits.float() / T, 1), soft.clone(), reduction="batchmean", log_target=True)
        return options.alpha * T * T * kl + (1 - options.alpha) * F.cross_entropy(logits, y)

    return loss
