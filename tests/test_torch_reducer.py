"""hfreduce.torch.GradientReducer and DistributedDataParallel: as one process that trains on all ranks' batches."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ranks

import hfreduce

torch = pytest.importorskip("torch", reason="torch is not installed")
from hfreduce.torch import DistributedDataParallel, GradientReducer  # noqa: E402

ranks.preload("torch")

STEPS = 4


def run_ranks(function: Callable[..., Any], nranks: int, *args: Any, **options: Any) -> list[Any]:
    return ranks.run_ranks(_one_thread, nranks, function, *args, **options)


def _one_thread(comm: hfreduce.Communicator, function: Callable[..., Any], *args: Any) -> Any:
    torch.set_num_threads(1)  # a forked OpenMP pool hangs; and the ranks share the cores
    return function(comm, *args)


class Net(torch.nn.Module):
    """Small and large parameters, one shared by two layers, one frozen, a scalar."""

    def __init__(self, seed: int = 0, dtype: Any = None, width: int = 160) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(20, width)
        self.middle = torch.nn.Linear(width, width, dtype=dtype)
        self.tied = torch.nn.Linear(width, width)
        self.tied.weight = self.middle.weight if dtype is None else self.tied.weight
        self.frozen = torch.nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.last = torch.nn.Linear(width, 5)

    def forward(self, x: Any) -> Any:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.middle(x.to(self.middle.weight.dtype))).float()
        return self.last(torch.tanh(self.frozen(self.tied(x))) * self.scale)


def batch(step: int, samples: int = 12) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(samples, 20, generator=generator), torch.randn(samples, 5, generator=generator)


def loss_of(model: Any, step: int, comm: hfreduce.Communicator | None = None) -> Any:
    """Of this rank's part of the global batch; the mean over ranks is that of the whole."""
    x, y = batch(step)
    if comm is not None:
        x, y = x[comm.rank :: comm.nranks], y[comm.rank :: comm.nranks]
    return (model(x) - y).square().mean()


def same_everywhere(comm: hfreduce.Communicator, model: Any) -> None:
    mine = np.concatenate([p.detach().reshape(-1).view(torch.uint8).numpy() for p in model.parameters()])
    assert (comm.broadcast(mine.copy(), root=0) == mine).all()


def check(mine: Any, expected: Any, tolerance: float = 1e-6, what: Any = "") -> None:
    """Equal within a tolerance; torch.testing takes seconds to import what it needs."""
    np.testing.assert_allclose(
        mine.detach().double().numpy(), expected.detach().double().numpy(), 0, tolerance, err_msg=str(what)
    )


def close_to(model: Any, reference: Any, tolerance: float = 1e-6) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters()):
        check(mine, theirs, tolerance, name)


class Optimizer:
    """SGD with momentum; torch's own takes seconds to import what it needs."""

    def __init__(self, model: Any) -> None:
        self.params = [param for param in model.parameters() if param.requires_grad]
        self.momentum = [torch.zeros_like(param) for param in self.params]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        for param, momentum in zip(self.params, self.momentum):
            if param.grad is not None:
                momentum.mul_(0.9).add_(param.grad)
                param.sub_(momentum, alpha=0.1)


# --- GradientReducer ---


def _trains(comm: hfreduce.Communicator, bucket_bytes: int, set_to_none: bool, dtype: Any) -> list[int]:
    model, reference = Net(dtype=dtype), Net(dtype=dtype)
    optimizer, optimizer_ref = Optimizer(model), Optimizer(reference)
    reducer = GradientReducer(model.named_parameters(), bucket_bytes, comm=comm)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, step, comm).backward()
        assert reducer.active
        reducer.synchronize()
        optimizer.step()
        optimizer_ref.zero_grad()
        loss_of(reference, step).backward()
        optimizer_ref.step()
        same_everywhere(comm, model)
    close_to(model, reference, 1e-6 if dtype is None else 2e-2)
    assert model.frozen.weight.grad is None and reducer.wait_seconds > 0
    sizes = [len(bucket.members) for bucket in reducer._buckets]
    reducer.close()
    return sizes


@pytest.mark.parametrize("nranks", [1, 2, 3, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 100_000, 1 << 30])
def test_as_one_process(nranks: int, bucket_bytes: int) -> None:
    sizes = run_ranks(_trains, nranks, bucket_bytes, True, None)[0]
    assert sum(sizes) == 8
    assert len(sizes) == {1: 8, 1 << 30: 1}.get(bucket_bytes, len(sizes))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_one_model(set_to_none: bool, dtype: Any) -> None:
    run_ranks(_trains, 2, 100_000, set_to_none, dtype)


def _no_copy(comm: hfreduce.Communicator) -> None:
    model = Net()
    reducer = GradientReducer(model, comm=comm)
    where: dict[str, int] = {}
    handle = model.middle.weight.register_post_accumulate_grad_hook(lambda p: where.update(weight=p.grad.data_ptr()))
    loss_of(model, 0, comm).backward()
    reducer.synchronize()
    assert model.middle.weight.grad.data_ptr() == where["weight"]  # a large one is reduced where autograd left it
    handle.remove()
    for _ in range(2):  # the buckets are made anew once
        for param in model.parameters():
            param.grad = None
        loss_of(model, 0, comm).backward()
        reducer.synchronize()
    view = model.first.bias.grad
    model.zero_grad(set_to_none=False)
    loss_of(model, 0, comm).backward()
    reducer.synchronize()
    assert model.first.bias.grad is view and view.any()  # a small one lies in its bucket
    mine = torch.full_like(view, float(comm.rank))
    model.first.bias.grad = mine  # the user's own
    model.scale.grad = None
    reducer.ready(model.first.bias)
    reducer.synchronize()
    assert (model.first.bias.grad == (comm.nranks - 1) / 2).all()
    assert model.scale.grad is None


def test_gradients_are_not_copied_where_they_need_not() -> None:
    run_ranks(_no_copy, 2)


class _Shared(torch.autograd.Function):
    """Gives two parameters gradients that lie in one memory, and hands that memory on."""

    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, x: Any) -> Any:
        return a + b + x

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        flat = grad.reshape(-1).clone()
        return flat.view(grad.shape), flat.view(grad.shape), flat.view(grad.shape)


def _shared_memory(comm: hfreduce.Communicator, op: str) -> None:
    a, b, x = (torch.nn.Parameter(torch.zeros(200, 200)) for _ in range(3))
    c = torch.nn.Parameter(torch.ones(200, 200))
    reducer = GradientReducer([c, x, a, b], 1, op, comm=comm)
    for _ in range(3):
        for param in (a, b, c, x):
            param.grad = None
        y = _Shared.apply(a, b, torch.tanh(x) * c)
        (y * (comm.rank + 1)).sum().backward()
        reducer.synchronize()
        expected = sum(range(1, comm.nranks + 1)) / (comm.nranks if op == "avg" else 1)
        for param in (a, b, x):
            assert (param.grad == expected).all()
        assert not c.grad.any()


@pytest.mark.parametrize("op", ["avg", "sum"])
def test_gradients_that_share_memory(op: str) -> None:
    """Autograd leaves such gradients in .grad; to reduce one in place would change the other, and what backward still reads."""
    run_ranks(_shared_memory, 3, op)


class Branches(torch.nn.Module):
    """Which layer is used is chosen by the caller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(20, 150 if i == 2 else 20) for i in range(5))
        self.large = torch.nn.Linear(150, 150)

    def forward(self, x: Any, which: list[int]) -> Any:
        total = x.sum() * 0
        for i in which:
            y = self.layers[i](x)
            total = total + (self.large(y) if i == 2 else y).square().mean()
        return total


def _dynamic(comm: hfreduce.Communicator, compress: str | None, wrapped: bool) -> None:
    model, reference = Branches(), Branches()
    options: dict[str, Any] = {"bucket_bytes": 3000, "compress": compress, "comm": comm}
    call: Any = model
    if wrapped:
        call = DistributedDataParallel(model, **options)
    else:
        reducer = GradientReducer(model.parameters(), **options)
    # by step: what each rank uses; layer 4 is used by none, and in the last but one step nothing by rank 1
    plans = [[[0, 1], [1, 3]], [[3, 0], [0]], [[2], [0, 2]], [[1], []], [[], [2, 1]], [[0, 1, 2, 3], [3, 2, 1, 0]]]
    for step, by_rank in enumerate(plans):
        x = batch(step)[0]
        model.zero_grad()
        reference.zero_grad()
        which = by_rank[comm.rank % 2]
        loss = call(x + comm.rank, which)
        if which:
            loss.backward()
            if not wrapped:
                reducer.synchronize()
        elif wrapped:
            call.reducer.synchronize()
        else:
            reducer.synchronize()
        for rank in range(comm.nranks):
            theirs = reference(x + rank, by_rank[rank % 2]) / comm.nranks
            if theirs.requires_grad:
                theirs.backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters()):
            assert (p.grad is None) == (q.grad is None), (step, name)
            if p.grad is not None:
                check(p.grad, q.grad, 5e-2 if compress else 1e-6, (step, name))
    assert model.layers[4].weight.grad is None or not model.layers[4].weight.grad.any()


@pytest.mark.parametrize("nranks", [2, 3])
@pytest.mark.parametrize("compress", [None, "fp16"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_dynamic_graphs(nranks: int, compress: str | None, wrapped: bool) -> None:
    run_ranks(_dynamic, nranks, compress, wrapped)


def _order(comm: hfreduce.Communicator) -> list[list[int]]:
    params = [torch.nn.Parameter(torch.ones(10)) for _ in range(6)]
    reducer = GradientReducer(params, 80, comm=comm)
    orders = []
    for _ in range(2):
        orders.append([bucket.members for bucket in reducer._buckets])
        mine = [2, 0, 4, 1, 5] if comm.rank == 0 else [5, 4, 3, 2, 1, 0]
        for index in mine:
            params[index].grad = torch.full((10,), float(comm.rank + index))
            reducer.ready(params[index])
        reducer.synchronize()
        for index in range(6):
            if index != 3:
                assert (params[index].grad == index + (comm.nranks - 1) / 2).all()
    return orders[1]


def test_buckets_follow_rank_0s_order() -> None:
    assert run_ranks(_order, 3) == [[[2, 0], [4, 1], [5, 3]]] * 3


def _accumulates(comm: hfreduce.Communicator, wrapped: bool) -> None:
    model, reference = Net(), Net()
    reducer: Any = DistributedDataParallel(model, comm=comm) if wrapped else GradientReducer(model, comm=comm)
    call = reducer if wrapped else model
    for start in (0, 3, 6):
        model.zero_grad(set_to_none=start != 3)
        reference.zero_grad()
        with reducer.no_sync():
            for step in (0, 1):
                loss_of(call, start + step, comm).backward()
        loss_of(call, start + 2, comm).backward()
        if not wrapped:
            reducer.synchronize()
        for step in range(3):
            loss_of(reference, start + step).backward()
        for p, q in zip(model.parameters(), reference.parameters()):
            if q.grad is not None:
                check(p.grad, q.grad)


@pytest.mark.parametrize("wrapped", [False, True])
def test_no_sync_accumulates(wrapped: bool) -> None:
    run_ranks(_accumulates, 2, wrapped)


def _compressed(comm: hfreduce.Communicator, compress: str, feedback: bool) -> float:
    torch.manual_seed(0)
    param, other = torch.nn.Parameter(torch.zeros(300, 100)), torch.nn.Parameter(torch.zeros(7))
    exact = torch.randn(300, 100)
    reducer = GradientReducer([param, other], 1, comm=comm, compress=compress, error_feedback=feedback)
    total = torch.zeros(300, 100, dtype=torch.float64)
    for _ in range(100):
        param.grad, other.grad = (exact.clone() if comm.rank == 0 else None), torch.full((7,), comm.rank + 0.5)
        reducer.synchronize()
        assert param.grad is not None and param.grad.dtype == torch.float32
        check(param.grad, exact / 2, 4e-2)
        assert (other.grad == comm.nranks / 2).all()
        total += param.grad
    same_everywhere(comm, torch.nn.ParameterList([torch.nn.Parameter(param.grad)]))
    return float((total / 100 - exact / 2).abs().max())


@pytest.mark.parametrize("compress", ["fp16", "bf16"])
def test_compression_and_error_feedback(compress: str) -> None:
    plain, fed_back = (run_ranks(_compressed, 2, compress, feedback)[0] for feedback in (False, True))
    assert 0 < fed_back < plain / 10


def _carried_over(comm: hfreduce.Communicator) -> None:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    reducer = GradientReducer(params, comm=comm, compress="bf16", error_feedback=True)
    for step in range(2):
        for index in (1, 0, 2) if step == 0 else (0, 1, 2):
            params[index].grad = torch.full((1,), 1 + 2**-9 * index) if step == 0 else torch.zeros(1)  # bf16 keeps 1
            reducer.ready(params[index])
        reducer.synchronize()
    assert [float(param.grad[0]) for param in params] == [0, 2**-9, 2**-8]


def test_residuals_outlive_the_first_buckets() -> None:
    run_ranks(_carried_over, 2)


def _overflow(comm: hfreduce.Communicator) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    reducer = GradientReducer([param], comm=comm, compress="fp16", error_feedback=True)
    param.grad = torch.tensor([1e6, float("nan"), 1.0])
    reducer.synchronize()
    assert param.grad[0] == float("inf") and param.grad[1].isnan() and param.grad[2] == 1
    param.grad = torch.tensor([1.0, 2.0, 3.0])
    reducer.synchronize()
    assert param.grad.tolist() == [1, 2, 3]


def test_an_overflow_is_not_fed_back() -> None:
    run_ranks(_overflow, 2)


def _layouts(comm: hfreduce.Communicator) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 80, 3).to(memory_format=torch.channels_last)
    wide = torch.nn.Parameter(torch.randn(200, 300).t())
    sparse_strides = torch.nn.Parameter(torch.randn(400, 100)[::2])
    params = [*conv.parameters(), wide, sparse_strides]
    reducer = GradientReducer(params, comm=comm)
    for step in range(3):
        if step != 1:
            for param in params:
                param.grad = None
        x = torch.randn(2, 64, 6, 6, generator=torch.Generator().manual_seed(step))
        expected = []
        for rank in range(comm.nranks):
            scale = rank + 1
            loss = conv(x * scale).square().mean() + (wide * scale).sum() + (sparse_strides * scale).square().sum()
            expected.append(torch.autograd.grad(loss, params))
        before = [None if param.grad is None else param.grad.clone() for param in params]
        scale = comm.rank + 1
        (conv(x * scale).square().mean() + (wide * scale).sum() + (sparse_strides * scale).square().sum()).backward()
        reducer.synchronize()
        for param, old, *grads in zip(params, before, *expected):
            total = sum(grads) / comm.nranks + (0 if old is None else old)
            check(param.grad, total, 1e-4)
            if param.is_contiguous():
                assert param.grad.is_contiguous()
    complex_ = torch.nn.Parameter(torch.zeros(5, dtype=torch.complex64))
    big = torch.nn.Parameter(torch.zeros(20000, dtype=torch.complex128))
    reducer = GradientReducer([complex_, big], comm=comm, compress="bf16")
    for param in (complex_, big):
        param.grad = torch.full_like(param, complex(comm.rank, 1))
    reducer.synchronize()
    assert all((param.grad == complex((comm.nranks - 1) / 2, 1)).all() for param in (complex_, big))


def test_memory_formats_and_complex() -> None:
    run_ranks(_layouts, 2)


def _lazy_signs(comm: hfreduce.Communicator) -> None:
    real = torch.nn.Parameter(torch.zeros(200, 200))
    complex_ = torch.nn.Parameter(torch.zeros(200, 200, dtype=torch.complex64))
    reducer = GradientReducer([real, complex_], comm=comm)
    real.grad = torch.full_like(real, comm.rank + 1.0)
    complex_.grad = torch.full_like(complex_, complex(1, comm.rank))
    if comm.rank == 0:
        real.grad, complex_.grad = torch._neg_view(real.grad).detach(), complex_.grad.conj().detach()  # as autograd leaves them
        assert real.grad.is_neg() and complex_.grad.is_conj()
    reducer.synchronize()
    n = comm.nranks
    assert (real.grad == (sum(range(2, n + 1)) - 1) / n).all()
    assert (complex_.grad == complex(1, sum(range(1, n)) / n)).all()


def test_one_rank_has_signs_that_torch_has_not_applied() -> None:
    """The memory of a negative or conjugate view holds other numbers than the tensor."""
    run_ranks(_lazy_signs, 2)


def _wrong(comm: hfreduce.Communicator) -> None:
    good = torch.nn.Parameter(torch.zeros(3))
    for params, options, words in [
        ([], {}, "none of them"),
        ([torch.zeros(3)], {}, "none of them"),
        ([good, 3], {}, "#1 is a int"),
        ([good * 2], {}, "leaf"),
        ([good], {"op": "max"}, "op"),
        ([good], {"compress": "int8"}, "compress"),
        ([good], {"group": "x", "comm": comm}, "not both"),
        ([torch.nn.Parameter(torch.zeros(3, device="meta"))], {}, "device meta"),
    ]:
        with pytest.raises(hfreduce.InvalidArgumentError, match=words):
            GradientReducer(params, **{"comm": comm, **options})
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    reducer = GradientReducer(embedding, comm=comm)
    with pytest.raises(hfreduce.InvalidArgumentError, match=r"weight has layout torch.sparse_coo.*sparse=False"):
        embedding(torch.tensor([1, 2])).sum().backward()
    embedding.zero_grad()
    reducer.synchronize()
    assert embedding.weight.grad is None
    reducer.close()
    with pytest.raises(hfreduce.InvalidUsageError, match="closed"):
        reducer.synchronize()
    reducer.close()
    embedding(torch.tensor([1, 2])).sum().backward()  # its hooks are gone
    model = Net()
    reducer = GradientReducer(model, 1, comm=comm)
    loss_of(model, 0, comm).backward()
    with pytest.raises(hfreduce.InvalidUsageError, match=r"second time.*no_sync.*use_reentrant=False"):
        loss_of(model, 1, comm).backward()
    reducer.synchronize()
    with pytest.raises(hfreduce.InvalidArgumentError, match="not one of"):
        reducer.ready(good)


def test_what_is_wrong_is_said() -> None:
    run_ranks(_wrong, 2)


def _differ(comm: hfreduce.Communicator, what: str) -> str:
    model = Net(width=161 if what == "shape" and comm.rank == 1 else 160)
    if what == "frozen" and comm.rank == 1:
        model.first.bias.requires_grad_(False)
    with pytest.raises(hfreduce.MismatchError) as caught:
        if what == "buffers":
            if comm.rank == 1:
                model.register_buffer("more", torch.zeros(3))
            DistributedDataParallel(model, comm=comm)
        else:
            GradientReducer(model, comm=comm)
    assert not model.first.weight._post_accumulate_grad_hooks
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [("shape", "first.weight (161, 20)"), ("frozen", "rank 0 has 'first.bias"), ("buffers", "more (3,)")],
)
def test_ranks_differ(what: str, words: str) -> None:
    messages = set(run_ranks(_differ, 2, what))
    assert len(messages) == 1
    (message,) = messages
    assert "rank 1 has" in message and words.replace("rank 0 has ", "") in message


class _Bug(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, what: str) -> Any:
        ctx.what = what
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if ctx.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("a bug in backward")


class Faulty(torch.nn.Module):
    """Layers, and between them what breaks on rank 1, in step 2."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.what, self.broken = torch.nn.Linear(20, 200), torch.nn.Linear(200, 200), what, False

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        return self.second(_Bug.apply(x, self.what) if self.broken else x)


def _fails(comm: hfreduce.Communicator, what: str, wrapped: bool) -> Any:
    model = Faulty(what)
    reducer: Any = DistributedDataParallel(model, bucket_bytes=1, comm=comm) if wrapped else GradientReducer(model, 1, comm=comm)
    call = reducer if wrapped else model
    for step in range(6):
        model.zero_grad()
        model.broken = step == 2 and comm.rank == 1
        try:
            call(batch(step)[0]).square().mean().backward()
            if not wrapped:
                reducer.synchronize()
        except (hfreduce.PeerLostError, hfreduce.AbortedError) as error:
            assert step == 2
            reducer.close()
            return type(error).__name__, str(error)
        except KeyError:
            if what == "raise":
                raise
            if wrapped:
                with pytest.raises(hfreduce.InvalidUsageError, match="did not come to its end"):
                    call(batch(step)[0])
            (reducer.reducer if wrapped else reducer).synchronize()  # ends the step with the others
        if step != 2:
            assert model.first.weight.grad.any()
    same = [comm.broadcast(p.grad.clone().numpy(), root=0) for p in model.parameters()]
    assert all((mine.grad.numpy() == theirs).all() for mine, theirs in zip(model.parameters(), same))
    return "went on"


@pytest.mark.limit(60)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("what", ["kill", "raise"])
def test_a_rank_is_lost_in_backward(what: str, wrapped: bool) -> None:
    outcomes = run_ranks(_fails, 3, what, wrapped, check=False)
    assert not outcomes[1].ok and (what == "kill" or isinstance(outcomes[1].error, KeyError)) and not outcomes[1].hung
    for rank in (0, 2):
        assert outcomes[rank].ok, outcomes[rank]
        kind, text = outcomes[rank].value
        assert "rank 1" in text and outcomes[rank].seconds < 8, text
        assert kind == "PeerLostError" or what == "raise"


@pytest.mark.limit(60)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_rank_goes_on_after_an_exception_in_backward(wrapped: bool) -> None:
    assert run_ranks(_fails, 3, "survive", wrapped) == ["went on"] * 3


def _dropped(comm: hfreduce.Communicator) -> None:
    model = Net()
    reducer = GradientReducer(model, comm=comm)
    inner = reducer.comm
    del reducer  # nothing else holds it
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss_of(model, 0, comm).backward()
    assert sys.getrefcount(inner) < 4
    with GradientReducer(model, comm=comm) as reducer:
        copied = copy.deepcopy(model)
        loss_of(copied, 0, comm).backward()
        assert not reducer.active  # a copy of the model is not the model


def test_a_dropped_reducer_leaves_nothing() -> None:
    run_ranks(_dropped, 2)


# --- DistributedDataParallel ---


class Buffered(torch.nn.Module):
    """With buffers of several dtypes, large and small, and outputs in containers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.norm = torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30)
        self.register_buffer("mask", torch.rand(30) > 0.5)
        self.register_buffer("large", torch.randn(200, 200).t())

    def forward(self, x: Any) -> Any:
        y = self.norm(self.layer(x))
        return {"out": [y, (y.sum(),)], "n": 3}


def _buffers(comm: hfreduce.Communicator, broadcast_buffers: bool) -> None:
    model, first = Buffered(comm.rank), Buffered(0)
    ddp = DistributedDataParallel(model, comm=comm, broadcast_buffers=broadcast_buffers)
    for mine, theirs in zip(model.state_dict().values(), first.state_dict().values()):
        assert (mine == theirs).all()
    optimizer = Optimizer(ddp)
    for step in range(3):
        optimizer.zero_grad()
        x = batch(step)[0] + comm.rank
        output = ddp(x)["out"]
        (output[0].square().mean() + output[1][0]).backward()
        optimizer.step()
        same_everywhere(comm, model)
    ddp.eval()
    ddp(batch(0)[0][: comm.rank + 1])  # no rank waits for another
    ddp.train()
    with torch.no_grad():
        if comm.rank == 0:
            ddp(batch(0)[0])
    ddp(batch(9)[0])["out"][0].sum().backward()
    means = comm.broadcast(model.norm.running_mean.clone().numpy(), root=0)
    assert (means == model.norm.running_mean.numpy()).all() == (broadcast_buffers or comm.rank == 0)
    assert model.norm.num_batches_tracked == 5 or not broadcast_buffers


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_parameters_and_buffers_are_rank_0s(broadcast_buffers: bool) -> None:
    run_ranks(_buffers, 2, broadcast_buffers)


def _ddp_trains(comm: hfreduce.Communicator, compress: str | None, checkpoint: str) -> None:
    from torch.utils.checkpoint import checkpoint as recompute

    # With reentrant checkpointing a parameter of its inside may be used nowhere else; with a dtype given nothing is shared.
    dtype = torch.float32 if checkpoint == "reentrant" else None
    model, reference = Net(comm.rank + 7, dtype), Net(7, dtype)
    if checkpoint:
        again = functools.partial(recompute, model.middle.forward, use_reentrant=checkpoint == "reentrant")
        model.middle.forward = again  # type: ignore[method-assign]
    ddp = DistributedDataParallel(model, bucket_bytes=50_000, comm=comm, compress=compress)
    optimizer, optimizer_ref = Optimizer(ddp), Optimizer(reference)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(ddp, step, comm).backward()
        assert not ddp.reducer.active
        optimizer.step()
        optimizer_ref.zero_grad()
        loss_of(reference, step).backward()
        optimizer_ref.step()
        same_everywhere(comm, model)
    close_to(model, reference, 2e-2 if compress else 1e-6)


@pytest.mark.parametrize("nranks", [2, 4])
@pytest.mark.parametrize("compress", [None, "bf16"])
def test_ddp_as_one_process(nranks: int, compress: str | None) -> None:
    run_ranks(_ddp_trains, nranks, compress, "")


def _last_in_checkpoint(comm: hfreduce.Communicator) -> None:
    from torch.utils.checkpoint import checkpoint as recompute

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = torch.nn.Linear(20, 20), torch.nn.Linear(20, 20)

        def forward(self, x: Any) -> Any:
            return recompute(self.b, torch.tanh(self.a(x)), use_reentrant=True)

    model = Last()
    ddp = DistributedDataParallel(model, bucket_bytes=1, comm=comm)
    calls = []
    whole = ddp.reducer.synchronize
    ddp.reducer.synchronize = lambda: calls.append(sum(ddp.reducer._ready)) or whole()  # type: ignore[method-assign]
    for step in range(2):
        model.zero_grad()
        ddp(batch(step)[0]).square().mean().backward()
    assert calls == [4, 4]


@pytest.mark.limit(150)
def test_ddp_whose_first_gradients_come_in_a_checkpoint() -> None:
    """Their pass ends before the one around it, and it is the latter whose end counts."""
    run_ranks(_last_in_checkpoint, 2, timeout=120.0, comm_timeout=60.0)


@pytest.mark.limit(150)
@pytest.mark.parametrize("checkpoint", ["reentrant", "not reentrant"])
def test_ddp_with_checkpointing(checkpoint: str) -> None:
    run_ranks(_ddp_trains, 2, None, checkpoint, timeout=120.0, comm_timeout=60.0)  # its first use imports torch's compiler


def _like_torchs(comm: hfreduce.Communicator) -> None:
    ddp, bare = DistributedDataParallel(Net(), comm=comm), Net(5)
    assert set(ddp.state_dict()) == {"module." + name for name in bare.state_dict()}
    ddp.load_state_dict(bare.state_dict())
    close_to(ddp.module, bare, 0)
    ddp.load_state_dict({name: value + 1 for name, value in ddp.state_dict().items()})
    assert torch.equal(ddp.module.scale, bare.scale + 1)
    with pytest.raises(RuntimeError, match="Missing key"):
        ddp.load_state_dict({})
    with pytest.raises(TypeError, match=r"\.module"):
        copy.deepcopy(ddp)
    with ddp.no_sync():  # a gradient of the inputs, as a penalty takes it
        x = torch.randn(3, 20, requires_grad=True)
        (grad,) = torch.autograd.grad(ddp(x).sum(), x)
    assert grad.shape == x.shape
    # two forward passes, one backward
    (ddp(batch(0)[0]).sum() + ddp(batch(1)[0]).sum()).backward()
    ddp.close()
    loss_of(ddp.module, 0, comm).backward()


def test_ddp_is_like_torchs() -> None:
    run_ranks(_like_torchs, 2)


def _from_launcher(rank: int, backend: str, port: int) -> float:
    torch.set_num_threads(1)
    group = None
    if backend:
        torch.distributed.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
        group = torch.distributed.new_group([1, 2])
        if rank == 0:
            torch.distributed.barrier()  # it hosts the store
            torch.distributed.destroy_process_group()
            return 0.5
    param = torch.nn.Parameter(torch.zeros(3))
    reducer = GradientReducer([param], group=group)
    (param * rank).sum().backward()
    reducer.synchronize()
    reducer.close()
    if backend:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return float(param.grad[0])


@pytest.mark.parametrize("backend", ["", "gloo", "hfreduce"])
def test_which_ranks(backend: str) -> None:
    """Those of the launcher; those of a process group, also of another backend."""
    with ranks.reserved_address() as address:
        port = int(address.rpartition(":")[2])
        values = ranks.run_ranks(_from_launcher, 3, backend, port, comm=False)
    assert values == ([0.5, 1.5, 1.5] if backend else [1.0] * 3)
