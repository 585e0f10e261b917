"""Functional collectives, eager, differentiated and compiled; mixture of experts over all-to-all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.nn.functional as differentiable
from harness import assert_equal
from torch import Tensor, nn

ROWS, COLUMNS = 4, 3  # of a part


def parts(rank: int, nranks: int) -> Tensor:
    """A rank's input: nranks parts of (ROWS, COLUMNS); integers, so that sums are exact."""
    count = nranks * ROWS * COLUMNS
    return (torch.arange(float(count)) + count * rank).view(nranks * ROWS, COLUMNS)


def slices(rank: int, nranks: int) -> list[int]:
    """Rows that a rank sends to each rank in the uneven all-to-all: none in some cases."""
    return [(rank + peer) % 3 for peer in range(nranks)]


def every(x: Tensor, group: Any, rank: int, nranks: int) -> dict[str, Tensor]:
    """One call of each functional collective."""
    flat = x.flatten()
    send, receive = slices(rank, nranks), [slices(peer, nranks)[rank] for peer in range(nranks)]
    coalesced = funcol.all_reduce_coalesced([x, flat * 2], "sum", group)
    gathered = funcol.all_gather_into_tensor_coalesced([x[:ROWS], flat[:5]], group)
    scattered = funcol.reduce_scatter_tensor_coalesced([x, flat], "sum", [0, 0], group)
    return {
        "sum": funcol.all_reduce(x, "sum", group),
        "avg": funcol.all_reduce(x, "avg", group),
        "max": funcol.all_reduce(-x, "max", group),
        "broadcast": funcol.broadcast(x, nranks - 1, group),
        "all_gather": funcol.all_gather_tensor(x[:ROWS], 0, group),
        "all_gather 1": funcol.all_gather_tensor(x[:ROWS], 1, group),
        "reduce_scatter": funcol.reduce_scatter_tensor(x, "sum", 0, group),
        "all_to_all": funcol.all_to_all_single(x, None, None, group),
        "uneven": funcol.all_to_all_single(x[: sum(send)], receive, send, group),
        "all_reduce_coalesced 0": coalesced[0] + 1,
        "all_reduce_coalesced 1": coalesced[1] + 1,
        "all_gather_coalesced 0": gathered[0] + 1,
        "all_gather_coalesced 1": gathered[1] + 1,
        "reduce_scatter_coalesced 0": scattered[0] + 1,
        "reduce_scatter_coalesced 1": scattered[1] + 1,
    }


def expected(rank: int, nranks: int) -> dict[str, Tensor]:
    """What `every` must give."""
    xs = [parts(peer, nranks) for peer in range(nranks)]
    total = torch.stack(xs).sum(0)
    heads = torch.cat([x[:ROWS] for x in xs])
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    uneven = []
    for peer, x in enumerate(xs):
        start = sum(slices(peer, nranks)[:rank])
        uneven.append(x[start : start + slices(peer, nranks)[rank]])
    return {
        "sum": total,
        "avg": total / nranks,
        "max": -xs[0],
        "broadcast": xs[-1],
        "all_gather": heads,
        "all_gather 1": torch.cat([x[:ROWS] for x in xs], 1),
        "reduce_scatter": total[mine],
        "all_to_all": torch.cat([x[mine] for x in xs]),
        "uneven": torch.cat(uneven),
        "all_reduce_coalesced 0": total + 1,
        "all_reduce_coalesced 1": total.flatten() * 2 + 1,
        "all_gather_coalesced 0": heads + 1,
        "all_gather_coalesced 1": torch.cat([x.flatten()[:5] for x in xs]) + 1,
        "reduce_scatter_coalesced 0": total[mine] + 1,
        "reduce_scatter_coalesced 1": total.flatten().chunk(nranks)[rank] + 1,
    }


def few(x: Tensor, group: Any, rank: int, nranks: int) -> dict[str, Tensor]:
    """Those that training needs most; each kernel that inductor compiles costs seconds."""
    return {
        "sum": funcol.all_reduce(x, "sum", group),
        "all_gather": funcol.all_gather_tensor(x[:ROWS], 0, group),
        "reduce_scatter": funcol.reduce_scatter_tensor(x, "sum", 0, group),
        "all_to_all": funcol.all_to_all_single(x, None, None, group),
    }


def functional(nranks: int, compiler: str) -> dict[str, Tensor]:
    rank = dist.get_rank()
    call: Callable[..., dict[str, Tensor]] = every
    if compiler:
        call = torch.compile(few if compiler == "inductor" else every, backend=compiler, fullgraph=True)
    for _ in range(2):  # the second call of a compiled function runs without guards failing
        results = call(parts(rank, nranks), dist.group.WORLD, rank, nranks)
    return {name: value + 0 for name, value in results.items()}  # waits


def check(ranks: Any, nranks: int, compiler: str, timeout: float) -> None:
    for rank, value in enumerate(ranks.run(functional, nranks, nranks, compiler, timeout=timeout)):
        wanted = {name: part for name, part in expected(rank, nranks).items() if compiler != "inductor" or name in value}
        assert_equal(value, wanted, 1e-6, 0.0, f"rank {rank}")


@pytest.mark.parametrize("nranks", [1, 2, 4])
def test_eager(ranks: Any, nranks: int) -> None:
    if ranks.backend == "gloo":
        pytest.skip("Gloo has no avg")
    check(ranks, nranks, "", 30.0)


@pytest.mark.limit(200)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(ranks: Any, compiler: str) -> None:
    if ranks.backend == "gloo":
        pytest.skip("Gloo has no avg")
    check(ranks, 2, compiler, 180.0)


# --- through autograd ---


def gradients(nranks: int) -> dict[str, Tensor]:
    """Inputs' gradients of a weighted sum of each collective's output."""
    rank = dist.get_rank()
    send, receive = slices(rank, nranks), [slices(peer, nranks)[rank] for peer in range(nranks)]
    group = dist.group.WORLD
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "all_reduce": differentiable.all_reduce,
        "broadcast": lambda x: differentiable.broadcast(x, 1),
        "all_gather": lambda x: torch.stack(differentiable.all_gather(x)),
        "reduce_scatter": lambda x: differentiable.reduce_scatter(torch.empty(ROWS, COLUMNS), list(x.split(ROWS))),
        "all_to_all": lambda x: torch.cat(differentiable.all_to_all([torch.empty(ROWS, COLUMNS)] * nranks, list(x.split(ROWS)))),
        "all_to_all_single": lambda x: differentiable.all_to_all_single(
            torch.empty(sum(receive), COLUMNS), x[: sum(send)], receive, send
        ),
        "funcol all_gather": lambda x: funcol.all_gather_tensor_autograd(x, 0, group),
        "funcol reduce_scatter": lambda x: funcol.reduce_scatter_tensor_autograd(x, "sum", 0, group),
        "funcol all_to_all": lambda x: funcol.all_to_all_single_autograd(x[: sum(send)], receive, send, group),
    }
    results = {}
    for name, call in calls.items():
        x = parts(rank, nranks).requires_grad_()
        y = call(x)
        weights = torch.arange(float(y.numel())).view(y.shape) * (rank + 1)
        (y * weights).sum().backward()
        results[name], results[f"{name} gradient"] = y.detach(), x.grad
    return results


@pytest.mark.parametrize("nranks", [2, 3])
def test_gradients(ranks: Any, nranks: int) -> None:
    ranks.compare(gradients, nranks, nranks)


# --- mixture of experts ---


class Experts(nn.Module):
    """A router, and one expert for each of `count`; `held` are those that this rank holds."""

    def __init__(self, count: int, held: list[int]) -> None:
        super().__init__()
        self.router = models.seeded(lambda: nn.Linear(models.IN, count), 2)
        self.experts = nn.ModuleDict({str(i): models.mlp(10 + i) for i in held})


def exchange(x: Tensor, send: list[int], receive: list[int], functional: bool) -> Tensor:
    """Rows of x to the ranks of their experts; differentiable."""
    if functional:
        y: Tensor = funcol.wait_tensor(funcol.all_to_all_single_autograd(x, receive, send, dist.group.WORLD))
        return y
    result: Tensor = differentiable.all_to_all_single(x.new_empty(sum(receive), x.shape[1]), x, receive, send)
    return result


def mixture(model: Experts, x: Tensor, functional: bool | None) -> Tensor:
    """The output of each row's expert, times its probability. functional None: all experts are here."""
    probability, chosen = torch.softmax(model.router(x), 1).max(1)
    order = torch.argsort(chosen, stable=True)
    rows = x[order]
    counts = torch.bincount(chosen, minlength=model.router.out_features)
    if functional is None:
        outputs = torch.cat([model.experts[str(i)](part) for i, part in enumerate(rows.split(counts.tolist()))])
    else:
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        send, receive = counts.tolist(), theirs.tolist()
        expert = model.experts[str(dist.get_rank())]
        outputs = exchange(expert(exchange(rows, send, receive, functional)), receive, send, functional)
    return outputs[torch.argsort(order)] * probability[:, None]


def moe(nranks: int, functional: bool) -> dict[str, Any]:
    rank = dist.get_rank()
    model = Experts(nranks, [rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        x, y = models.batch(step, rank)
        nn.functional.mse_loss(mixture(model, x, functional), y).backward()
        for parameter in model.router.parameters():  # data parallel; an expert's gradient already sums over all ranks' rows
            dist.all_reduce(parameter.grad)
            parameter.grad /= nranks
        for parameter in model.experts.parameters():
            parameter.grad /= nranks
        optimizer.step()
    gathered: list[Any] = [None] * nranks
    dist.all_gather_object(gathered, models.weights(model))
    return {"weights": dict(sorted({k: v for part in gathered for k, v in part.items()}.items()))}


def moe_alone(nranks: int, functional: bool) -> dict[str, Any]:
    model = Experts(nranks, list(range(nranks)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        x, y = models.whole_batch(step, nranks)
        nn.functional.mse_loss(mixture(model, x, None), y).backward()
        optimizer.step()
    return {"weights": dict(sorted(models.weights(model).items()))}


@pytest.mark.parametrize("functional", [True, False], ids=["functional", "nn.functional"])
@pytest.mark.parametrize("nranks", [2, 4])
def test_mixture_of_experts(ranks: Any, nranks: int, functional: bool) -> None:
    ranks.compare(moe, nranks, nranks, functional, reference=moe_alone, identical=("weights",))
