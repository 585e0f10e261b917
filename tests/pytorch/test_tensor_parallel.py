"""DTensor and tensor parallel: every redistribution, sharded operators, column- and row-wise layers, sequence and loss parallel, 2-D."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

dtensor = pytest.importorskip("torch.distributed.tensor", reason="this torch has no torch.distributed.tensor")
if not hasattr(dtensor, "distribute_tensor"):
    pytest.skip("this torch has no public torch.distributed.tensor", allow_module_level=True)
DTensor, Partial, Replicate, Shard = dtensor.DTensor, dtensor.Partial, dtensor.Replicate, dtensor.Shard


def placement(letter: str) -> Any:
    return {"R": Replicate(), "P": Partial(), "0": Shard(0), "1": Shard(1)}[letter]


def matrix() -> Tensor:
    """Integers, so that sums are exact; of a shape that divides by no number of ranks."""
    return torch.arange(35.0).view(5, 7)


def redistributed(shape: tuple[int, ...]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", shape)
    results = {}
    letters = "R01P" if len(shape) == 1 else "R0P"
    layouts = [(a,) for a in letters] if len(shape) == 1 else [(a, b) for a in letters for b in letters]
    for source in layouts:
        x = dtensor.distribute_tensor(matrix(), mesh, [placement("R" if a == "P" else a) for a in source])
        if "P" in source:  # summands: 1, 2, ... parts of a whole that they make up together
            local, axes = x.to_local(), [i for i, a in enumerate(source) if a == "P"]
            for axis in axes:
                size, mine = mesh.size(axis), mesh.get_local_rank(axis)
                local = local * (1 + mine) * 2 / (size * (size + 1))
            x = DTensor.from_local(local, mesh, [placement(a) for a in source], shape=x.shape, stride=x.stride())
        for target in layouts:
            if any(b == "P" and a != "P" for a, b in zip(source, target)):
                continue  # nobody makes summands of a whole
            y = x.redistribute(mesh, [placement(a) for a in target])
            results["".join(source) + "->" + "".join(target)] = y.full_tensor()
    return results


def redistributed_alone(shape: tuple[int, ...]) -> dict[str, Any]:
    letters = "R01P" if len(shape) == 1 else "R0P"
    layouts = list(letters) if len(shape) == 1 else [a + b for a in letters for b in letters]
    return {
        f"{source}->{target}": matrix()
        for source in layouts
        for target in layouts
        if not any(b == "P" and a != "P" for a, b in zip(source, target))
    }


@pytest.mark.parametrize("shape", [(2,), (3,), (4,), (2, 2)], ids=str)
def test_redistribute(ranks: Any, shape: tuple[int, ...]) -> None:
    nranks = 4 if shape == (2, 2) else shape[0]
    ranks.compare(redistributed, nranks, shape, reference=redistributed_alone, identical=list(redistributed_alone(shape)))


def operators(nranks: int) -> dict[str, Any]:
    def spread(x: Tensor, dim: int) -> Any:
        return x.clone() if nranks == 0 else dtensor.distribute_tensor(x, mesh, [Shard(dim)])

    def whole(x: Any) -> Any:
        return x if nranks == 0 else x.full_tensor()

    mesh = None if nranks == 0 else init_device_mesh("cpu", (nranks,))
    a, b = models.seeded(lambda: (torch.randn(6, 9), torch.randn(9, 5)))
    x, y = spread(a, 1).requires_grad_(), spread(b, 0).requires_grad_()
    product = x @ y
    (product.square().sum() + (spread(a, 0).mean(0) * 3).max() + x.norm()).backward()
    return {
        "product": whole(product.detach()),
        "columns": whole((spread(b, 1) * 2).sum(0)),
        "softmax": whole(torch.softmax(spread(a, 1), 1)),
        "stacked": whole(torch.cat([spread(a, 0), spread(a, 0)], 1)),
        "x.grad": whole(x.grad),
        "y.grad": whole(y.grad),
    }


def operators_alone(nranks: int) -> dict[str, Any]:
    return operators(0)


@pytest.mark.parametrize("nranks", [2, 4])
def test_operators(ranks: Any, nranks: int) -> None:
    ranks.compare(operators, nranks, nranks, reference=operators_alone)


# --- parallel layers ---


def train_mlp(model: nn.Module, shard: int, steps: int = 4) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for number in range(steps):
        optimizer.zero_grad()
        models.loss_of(model, *models.batch(number, shard)).backward()
        optimizer.step()
    return {"weights": {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}}


PLAN = {"first": ColwiseParallel(), "middle": RowwiseParallel(), "last": ColwiseParallel(output_layouts=Replicate())}


def parallel_mlp(nranks: int) -> dict[str, Any]:
    """All ranks train on the same data."""
    return train_mlp(parallelize_module(models.mlp(), init_device_mesh("cpu", (nranks,)), PLAN), shard=0)


def one_shard(nranks: int) -> dict[str, Any]:
    return models.alone(1)


@pytest.mark.parametrize("nranks", [2, 4])
def test_colwise_rowwise(ranks: Any, nranks: int) -> None:
    ranks.compare(parallel_mlp, nranks, nranks, reference=one_shard, identical=("weights",))


def two_dimensional(nranks: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(models.mlp(), mesh["tp"], PLAN)
    for layer in (model.first, model.middle, model.last):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return train_mlp(model, shard=mesh.get_local_rank("dp"))


def two_shards(nranks: int) -> dict[str, Any]:
    return models.alone(2)


def test_two_dimensional(ranks: Any) -> None:
    pytest.importorskip("torch.distributed.fsdp", reason="no FSDP")
    ranks.compare(two_dimensional, 4, 4, reference=two_shards, identical=("weights",))


VOCABULARY, WIDTH, LENGTH = 12, 8, 4


class Language(nn.Module):
    """Embedding, a normalised residual block, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, LENGTH); returns logits (batch, LENGTH, VOCABULARY)."""
        x = self.embedding(tokens)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x)  # type: ignore[no-any-return]


def language(nranks: int) -> dict[str, Any]:
    """With nranks 0: alone. The sequence is sharded between the layers, the vocabulary in the logits and the loss."""
    model = models.seeded(Language)
    if nranks:
        plan = {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
        }
        model = parallelize_module(model, init_device_mesh("cpu", (nranks,)), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for number in range(4):
        tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        logits = model(tokens)
        if nranks:
            with loss_parallel():
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
                loss.backward()
            loss = loss.full_tensor()
        else:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {n: p.detach().full_tensor() if nranks else p.detach() for n, p in model.named_parameters()}
    return {"weights": found, "losses": losses}


def language_alone(nranks: int) -> dict[str, Any]:
    return language(0)


@pytest.mark.parametrize("nranks", [2, 4])
def test_sequence_and_loss_parallel(ranks: Any, nranks: int) -> None:
    ranks.compare(language, nranks, nranks, reference=language_alone, identical=("weights",))


class Root(nn.Module):
    """An MLP that takes what it is given, for PrepareModuleInput."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)  # type: ignore[no-any-return]


def prepared(nranks: int) -> dict[str, Any]:
    """Each rank brings its own rows; they are gathered for column-wise layers."""
    mesh = init_device_mesh("cpu", (nranks,))
    plan: dict[str, Any] = {"mlp": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate())}
    plan.update({f"mlp.{name}": style for name, style in PLAN.items()})
    model = parallelize_module(Root(), mesh, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for number in range(4):
        optimizer.zero_grad()
        x, _ = models.batch(number, dist.get_rank())
        _, y = models.whole_batch(number, nranks)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return {"weights": {n.replace("mlp.", ""): p.detach().full_tensor() for n, p in model.named_parameters()}}


def all_shards(nranks: int) -> dict[str, Any]:
    return models.alone(nranks)


def test_prepared_input(ranks: Any) -> None:
    ranks.compare(prepared, 2, 2, reference=all_shards, identical=("weights",))
