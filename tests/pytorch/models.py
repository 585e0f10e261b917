"""Small models and data that the training tests share; the same on every rank, in every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IN, HIDDEN, OUT = 6, 16, 4


class MLP(nn.Module):
    """Three layers; `skip` leaves the middle one out of a forward pass, so that it has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, HIDDEN)
        self.middle = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        """x: (batch, IN); returns (batch, OUT)."""
        x = torch.relu(self.first(x))
        if not skip:
            x = torch.relu(self.middle(x))
        return self.last(x)  # type: ignore[no-any-return]


def seeded(make: Callable[[], Any], seed: int = 1) -> Any:
    """make() under a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def mlp(seed: int = 1) -> MLP:
    """An MLP, the same for the same seed."""
    model: MLP = seeded(MLP, seed)
    return model


def batch(step: int, rank: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs (size, IN) and targets (size, OUT) of a rank at a step."""
    random = torch.Generator().manual_seed(1000 * step + rank + 7)
    return torch.randn(size, IN, generator=random), torch.randn(size, OUT, generator=random)


def whole_batch(step: int, nranks: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """The batches of all ranks, one after the other."""
    xs, ys = zip(*(batch(step, rank, size) for rank in range(nranks)))
    return torch.cat(xs), torch.cat(ys)


def loss_of(model: nn.Module, x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
    """Mean squared error; mean over the batch, so that equal shards average to the whole."""
    return nn.functional.mse_loss(model(x, **kwargs), y)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers, as copies, wrappers' prefixes left out."""
    return {name.replace("module.", ""): value.detach().clone() for name, value in model.state_dict().items()}


def alone(nranks: int, steps: int = 4, lr: float = 0.2, momentum: float = 0.9) -> dict[str, Any]:
    """What data-parallel training of the MLP on nranks ranks must give: one process, all batches, SGD."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, *whole_batch(step, nranks)).backward()
        optimizer.step()
    return {"weights": weights(model)}
