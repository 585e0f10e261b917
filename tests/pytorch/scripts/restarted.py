"""Train with DDP under torchrun, saving each step; on the first attempt one rank dies of SIGKILL in the middle of backward.

Arguments: folder for checkpoints and results, steps, and the step in which rank 1 dies.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[1:3])  # tests/pytorch and tests
import harness
import models


def main() -> None:
    """Go on from the last checkpoint, if there is one."""
    folder, steps, fatal = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    module, backend = harness.backend_under_test()
    if module:
        __import__(module)
    dist.init_process_group(backend)
    rank = dist.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(models.mlp(), bucket_cap_mb=0.0005)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    saved = folder / "checkpoint.pt"
    first = 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    if attempt == 0 and rank == 1:

        def die(gradient: torch.Tensor) -> None:
            if step == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        model.module.middle.weight.register_hook(die)
    try:
        for step in range(first, steps):
            optimizer.zero_grad()
            models.loss_of(model, *models.batch(step, rank)).backward()
            optimizer.step()
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, folder / "new")
                os.replace(folder / "new", saved)
            dist.barrier()
    except RuntimeError as error:
        (folder / f"writing-{rank}").write_text(f"{type(error).__name__}: {error}")
        os.replace(folder / f"writing-{rank}", folder / f"error-{attempt}-{rank}")
        raise
    torch.save({"first": first, "attempt": attempt, "weights": models.weights(model)}, folder / f"result-{rank}.pt")
    dist.destroy_process_group()


main()
