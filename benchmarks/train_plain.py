"""A training as one writes it by hand for torchrun: what train_overhead.py holds `portaisys train` against.

    torchrun --standalone --nproc-per-node 2 benchmarks/train_plain.py SPEC.yaml FOLDER

Nothing of portaisys but the model's class and the reading of the data; numbers come from the same spec. The rows lie in memory as tensors.
As there, rank 0 scores the validation rows after each epoch and writes a checkpoint every so many steps. Leaves FOLDER/log.jsonl and
FOLDER/model.safetensors. Every batch must be of one size.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from portaisys import data, models, spec


def main() -> None:
    options, folder = spec.load(sys.argv[1]), Path(sys.argv[2])
    train = options.train
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    splits = data.load(options.data)
    x, y = torch.from_numpy(splits.train.x), torch.from_numpy(splits.train.y)
    x_val, y_val = torch.from_numpy(splits.validation.x), torch.from_numpy(splits.validation.y)
    steps, rest = divmod(len(x), train.batch_size)
    assert not rest, f"{len(x)} rows are no whole batches of {train.batch_size}"

    torch.manual_seed(options.seed)
    model = models.build(options.model, splits.shape, len(splits.labels), splits.mean, splits.std)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    decayed, others = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.momentum, nesterov=True)
    total = train.epochs * steps
    warmup = max(1, round(total * train.warmup_fraction))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    )

    step = 0
    for epoch in range(train.epochs):
        ddp.train()
        losses = torch.zeros(())
        order = torch.from_numpy(np.random.default_rng((options.seed, epoch)).permutation(len(x)))
        for batch in order.split(train.batch_size):
            rows = batch[rank::world]
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(ddp(x[rows]), y[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
            optimizer.step()
            schedule.step()
            losses += loss.detach()
            step += 1
            if rank == 0 and (step % train.checkpoint_every_steps == 0 or step == total):
                torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "checkpoint.tmp")
                (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")
        dist.all_reduce(losses)
        if rank == 0:
            model.eval()
            with torch.inference_mode():
                right = sum(int((model(part).argmax(1) == labels).sum()) for part, labels in zip(x_val.split(512), y_val.split(512), strict=True))
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"epoch": epoch + 1, "step": step, "loss": losses.item() / steps / world, "validation_accuracy": right / len(x_val)}) + "\n")
    if rank == 0:
        save_file(model.state_dict(), folder / "model.safetensors")
    dist.barrier()  # a rank that leaves while the other still writes may be ended by its own exchange threads
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
