"""all_reduce, reduce and reduce_scatter of the c10d API: every op, dtype, layout and form, against plain torch arithmetic."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensors import (
    ALL,
    COMPLEX,
    FLOATS,
    FLOATS8,
    HALF_COMPLEX,
    INTEGERS,
    OP,
    SIGNED,
    expect,
    finish,
    make,
    ops_of,
    reduced,
    scattered,
)

NRANKS = pytest.mark.parametrize("nranks", [1, 2, 3, 4])
REDUCIBLE = [dtype for dtype in ALL if dtype not in FLOATS8 + HALF_COMPLEX]
LAYOUTS = ("dense", "strided", "transposed")


def inputs(shape: Any, dtype: torch.dtype, salt: int = 0) -> list[torch.Tensor]:
    """What each rank of the default group puts in."""
    return [make(shape, dtype, rank, salt) for rank in range(dist.get_world_size())]


# --- all_reduce ---


def all_reduce_dtypes(async_op: bool) -> None:
    rank = dist.get_rank()
    for dtype in REDUCIBLE:
        for op in ops_of(dtype):
            every = inputs(11, dtype)
            mine = every[rank].clone()
            finish(dist.all_reduce(mine, op, async_op=async_op))
            expect(mine, reduced(every, op), dtype, op, rounding=op == OP.AVG)


@NRANKS
@pytest.mark.parametrize("async_op", [False, True], ids=["sync", "async"])
def test_all_reduce_of_every_dtype_and_op(ranks: Any, nranks: int, async_op: bool) -> None:
    ranks.run(all_reduce_dtypes, nranks, async_op)


def all_reduce_narrow_dtypes() -> None:
    """Those in which hardly any sum is exact: powers of two, equal on all ranks, whose sum by 1, 2 or 4 ranks is one too."""
    nranks = dist.get_world_size()
    for dtype in [dtype for dtype in FLOATS8 if dtype != getattr(torch, "float8_e8m0fnu", None)]:
        same = make(9, dtype, 0)
        mine = same.clone()
        dist.all_reduce(mine)
        expect(mine, (same.to(torch.float32) * nranks).to(dtype), dtype)
    for dtype in HALF_COMPLEX:
        every = inputs(9, dtype)
        mine = every[dist.get_rank()].clone()
        dist.all_reduce(mine)
        expect(mine, reduced(every), dtype)


@pytest.mark.parametrize("nranks", [1, 2, 4])
def test_all_reduce_of_fp8_and_half_complex(ranks: Any, nranks: int) -> None:
    ranks.run(all_reduce_narrow_dtypes, nranks)


def all_reduce_layouts() -> None:
    rank = dist.get_rank()
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.bool, torch.int16):
        for shape in ((), (0,), (3, 0), (1,), (5,), (3, 7), (2, 3, 4, 5), (70_001,)):
            for how in LAYOUTS:
                every = inputs(shape, dtype)
                mine = scattered(every[rank], how)
                strides, place = mine.stride(), mine.data_ptr()
                dist.all_reduce(mine)
                expect(mine, reduced(every), dtype, shape, how)
                assert (mine.stride(), mine.data_ptr()) == (strides, place), f"{shape} {how} moved"
    every = inputs((2, 3, 5, 4), torch.float32)
    mine = every[rank].to(memory_format=torch.channels_last)
    dist.all_reduce(mine)
    expect(mine, reduced(every), "channels_last")
    assert mine.is_contiguous(memory_format=torch.channels_last)


@NRANKS
def test_all_reduce_of_every_shape_and_layout(ranks: Any, nranks: int) -> None:
    ranks.run(all_reduce_layouts, nranks)


def all_reduce_strided_leaves_the_gaps() -> None:
    wide = torch.arange(12.0)
    dist.all_reduce(wide[::3])
    wanted = torch.arange(12.0)
    wanted[::3] *= dist.get_world_size()
    expect(wide, wanted)


def test_all_reduce_of_a_slice_leaves_what_lies_between(ranks: Any) -> None:
    ranks.run(all_reduce_strided_leaves_the_gaps, 2)


def all_reduce_random() -> None:
    """Numbers whose sum depends on the order: close to the exact sum, and the same bits on all ranks, twice."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for dtype in FLOATS + COMPLEX:
        every = [torch.randn(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(nranks)]
        every = [tensor.to(dtype) for tensor in every]
        results = []
        for _ in range(2):
            mine = every[rank].clone()
            dist.all_reduce(mine)
            results.append(mine)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        wanted = torch.stack([tensor.to(wide) for tensor in every]).sum(0).to(dtype)
        expect(results[0], wanted, dtype, rounding=True)
        assert torch.equal(results[0], results[1]), f"{dtype}: other bits the second time"
        of_rank_0 = results[0].clone()
        dist.broadcast(of_rank_0, 0)
        assert torch.equal(results[0], of_rank_0), f"{dtype}: other bits than rank 0"


@pytest.mark.parametrize("nranks", [3, 4])
def test_all_reduce_has_the_same_bits_everywhere(ranks: Any, nranks: int) -> None:
    ranks.run(all_reduce_random, nranks)


def all_reduce_special_values() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    nan, inf = float("nan"), float("inf")
    rows = [[nan, 1, inf, -inf, 0.0], [2, nan, inf, -inf, -0.0], [3, 4, 1, 1, 1]][:nranks]
    for dtype in FLOATS:
        for op in (OP.SUM, OP.MAX, OP.MIN):
            every = [torch.tensor(row, dtype=dtype) for row in rows]
            mine = every[rank].clone()
            dist.all_reduce(mine, op)
            torch.testing.assert_close(mine, reduced(every, op), equal_nan=True, rtol=0, atol=0, msg=f"{dtype} {op}: {mine}")


def test_all_reduce_of_nan_and_inf(ranks: Any) -> None:
    ranks.run(all_reduce_special_values, 3)


def all_reduce_integer_limits() -> None:
    """Sums wrap as torch's own; averages of large numbers come from the exact sum."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for dtype in INTEGERS:
        last = torch.iinfo(dtype).max
        mine = torch.full((3,), last, dtype=dtype)
        dist.all_reduce(mine, OP.MAX)
        assert mine.tolist() == [last] * 3, f"{dtype} max"
        mine = torch.full((3,), last if rank == 0 else 1, dtype=dtype)
        dist.all_reduce(mine)
        bits = torch.iinfo(dtype).bits
        total = (last + nranks - 1) % 2**bits
        wrapped = total - 2**bits if dtype in SIGNED and total >= 2 ** (bits - 1) else total
        assert mine.tolist() == [wrapped] * 3, f"{dtype} sum: {mine.tolist()} not {wrapped}"


def test_all_reduce_of_large_integers(ranks: Any) -> None:
    ranks.run(all_reduce_integer_limits, 2)


def all_reduce_premul_sum() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for dtype in FLOATS:
        every = inputs(10, dtype)
        mine = every[rank].clone()
        dist.all_reduce(mine, dist._make_nccl_premul_sum(0.5))
        expect(mine, (torch.stack(every).double().sum(0) * 0.5).to(dtype), dtype, "all_reduce")
        whole = [make((nranks, 3), dtype, r) for r in range(nranks)]
        part = torch.empty(3, dtype=dtype)
        dist.reduce_scatter_tensor(part, whole[rank].flatten(), dist._make_nccl_premul_sum(0.25))
        expect(part, (torch.stack(whole).double().sum(0)[rank] * 0.25).to(dtype), dtype, "reduce_scatter")


@NRANKS
def test_premultiplied_sum(ranks: Any, nranks: int) -> None:
    ranks.run(all_reduce_premul_sum, nranks)


def sparse_of(rank: int, nranks: int, dense_dims: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of which some are this rank's alone, some are shared, one occurs twice."""
    rows = torch.tensor([[rank, nranks, nranks + rank, nranks]])
    values = make((4, *(3,) * dense_dims), dtype, rank)
    return torch.sparse_coo_tensor(rows, values, (2 * nranks + 1, *(3,) * dense_dims))


def sparse_all_reduce() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.float32, torch.float64, torch.int64):
        for dense_dims in (0, 1, 2):
            every = [sparse_of(r, nranks, dense_dims, dtype) for r in range(nranks)]
            mine = every[rank].clone()
            dist.all_reduce(mine)
            expect(mine.to_dense(), reduced([tensor.to_dense() for tensor in every]), dtype, dense_dims)
    mine = torch.sparse_coo_tensor(torch.zeros((1, 0), dtype=torch.int64), torch.zeros(0), (4,))
    if rank == 0:
        mine = torch.sparse_coo_tensor([[2]], [5.0], (4,))
    dist.all_reduce(mine)
    expect(mine.to_dense(), torch.tensor([0.0, 0, 5, 0]), "empty on all but one")
    work = dist.all_reduce(mine, async_op=True)
    work.wait()
    result = work.result()[0] if work.result() else mine
    expect(result.to_dense(), torch.tensor([0.0, 0, 5 * nranks, 0]), "async")


@NRANKS
def test_all_reduce_of_sparse_tensors(ranks: Any, nranks: int) -> None:
    ranks.run(sparse_all_reduce, nranks)


def all_reduce_coalesced() -> None:
    rank = dist.get_rank()
    for dtype in (torch.float32, torch.int64, torch.complex64):
        for op in (OP.SUM, OP.MAX) if not dtype.is_complex else (OP.SUM,):
            every = [inputs(shape, dtype, salt) for salt, shape in enumerate(((3,), (2, 5), (), (0,), (1000,)))]
            for async_op in (False, True):
                mine = [tensors[rank].clone() for tensors in every]
                finish(dist.all_reduce_coalesced(mine, op, async_op=async_op))
                for i, tensors in enumerate(every):
                    expect(mine[i], reduced(tensors, op), dtype, op, i)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nranks", [1, 3])
def test_all_reduce_coalesced(ranks: Any, nranks: int) -> None:
    ranks.run(all_reduce_coalesced, nranks)


# --- reduce ---


def reduce_to_each_root() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for root in range(nranks):
        for dtype in REDUCIBLE:
            for op in ops_of(dtype):
                every = inputs(6, dtype, root)
                mine = every[rank].clone()
                dist.reduce(mine, root, op)
                if rank == root:
                    expect(mine, reduced(every, op), root, dtype, op, rounding=op == OP.AVG)
        for how in LAYOUTS:
            for shape in ((4, 3), (), (0,), (50_000,)):
                every = inputs(shape, torch.float32)
                mine = scattered(every[rank], how)
                finish(dist.reduce(mine, group_dst=root, async_op=True))
                if rank == root:
                    expect(mine, reduced(every), root, shape, how)


@NRANKS
def test_reduce(ranks: Any, nranks: int) -> None:
    ranks.run(reduce_to_each_root, nranks)


# --- reduce_scatter ---


def reduce_scatter_list() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for dtype in REDUCIBLE:
        for op in ops_of(dtype):
            every = [[make(5, dtype, r, part) for part in range(nranks)] for r in range(nranks)]
            out = torch.empty(5, dtype=dtype)
            dist.reduce_scatter(out, every[rank], op)
            expect(out, reduced([parts[rank] for parts in every], op), dtype, op, rounding=op == OP.AVG)
    for how in LAYOUTS:
        every = [[make((3, 4), torch.float32, r, part) for part in range(nranks)] for r in range(nranks)]
        out = scattered(torch.zeros(3, 4), how)
        finish(dist.reduce_scatter(out, [scattered(part, how) for part in every[rank]], async_op=True))
        expect(out, reduced([parts[rank] for parts in every]), how)


@NRANKS
def test_reduce_scatter_of_a_list(ranks: Any, nranks: int) -> None:
    ranks.run(reduce_scatter_list, nranks)


def reduce_scatter_uneven() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.float32, torch.int64, torch.bfloat16):
        for shapes in ([(part + 1, 2) for part in range(nranks)], [(3 * part,) for part in range(nranks)]):
            every = [[make(shapes[part], dtype, r, part) for part in range(nranks)] for r in range(nranks)]
            for op in (OP.SUM, OP.MAX, OP.AVG):
                out = torch.empty(shapes[rank], dtype=dtype)
                finish(dist.reduce_scatter(out, every[rank], op, async_op=True))
                expect(out, reduced([parts[rank] for parts in every], op), dtype, shapes, op, rounding=op == OP.AVG)


@NRANKS
def test_reduce_scatter_of_uneven_parts(ranks: Any, nranks: int) -> None:
    ranks.run(reduce_scatter_uneven, nranks)


def reduce_scatter_tensor() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for dtype in REDUCIBLE:
        for op in ops_of(dtype):
            whole = inputs((nranks * 4, 3), dtype)
            wanted = reduced(whole, op)[4 * rank : 4 * rank + 4]
            out = torch.empty((4, 3), dtype=dtype)
            dist.reduce_scatter_tensor(out, whole[rank], op)
            expect(out, wanted, dtype, op, rounding=op == OP.AVG)
    for how in LAYOUTS:
        for shape in ((3, 4), (0,), (20_000,)):
            whole = inputs((nranks, *shape), torch.float32)
            out = scattered(torch.zeros(shape), how)
            finish(dist.reduce_scatter_tensor(out, scattered(whole[rank], how), async_op=True))
            expect(out, reduced(whole)[rank], how, shape)
    whole = inputs((nranks, 6), torch.float32)
    mine = whole[rank].clone()
    dist.reduce_scatter_tensor(mine[rank], mine)
    expect(mine[rank], reduced(whole)[rank], "in place")


@NRANKS
def test_reduce_scatter_tensor(ranks: Any, nranks: int) -> None:
    ranks.run(reduce_scatter_tensor, nranks)


# --- the same through the group's methods ---


def group_methods() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    every = inputs((nranks, 4), torch.float32)
    wanted, most = reduced(every), reduced(every, OP.MAX)

    mine = every[rank].clone()
    group.allreduce([mine]).wait()
    expect(mine, wanted, "allreduce([t])")
    mine = every[rank].clone()
    group.allreduce(mine, OP.MAX).wait()
    expect(mine, most, "allreduce(t, op)")
    mine = every[rank].clone()
    group.allreduce(mine, OP.MAX, timedelta(seconds=20)).wait()
    expect(mine, most, "allreduce(t, op, timeout)")
    options = dist.AllreduceOptions()
    options.reduceOp = OP.MAX
    mine = every[rank].clone()
    group.allreduce([mine], options).wait()
    expect(mine, most, "allreduce([t], opts)")
    several = [every[rank].clone(), every[rank].clone()]
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp = OP.MAX
    group.allreduce_coalesced(several, options).wait()
    for i, mine in enumerate(several):
        expect(mine, most, "allreduce_coalesced", i)

    for arguments in ((OP.MAX,), (OP.MAX, timedelta(seconds=20))):
        mine = every[rank].clone()
        group.reduce(mine, nranks - 1, *arguments).wait()
        if rank == nranks - 1:
            expect(mine, most, "reduce(t, root, ...)", arguments)
    options = dist.ReduceOptions()
    options.rootRank, options.reduceOp = 0, OP.SUM
    mine = every[rank].clone()
    group.reduce([mine], options).wait()
    if rank == 0:
        expect(mine, wanted, "reduce([t], opts)")

    out = torch.empty(4)
    group.reduce_scatter(out, list(every[rank].unbind()), OP.MAX).wait()
    expect(out, most[rank], "reduce_scatter(out, list, op)")
    out = torch.empty(4)
    group.reduce_scatter([out], [list(every[rank].unbind())]).wait()
    expect(out, wanted[rank], "reduce_scatter([out], [list])")
    out = torch.empty(4)
    group._reduce_scatter_base(out, every[rank].clone()).wait()
    expect(out, wanted[rank], "_reduce_scatter_base")
    outs = [torch.empty(4), torch.empty(4)]
    group.reduce_scatter_tensor_coalesced(outs, [every[rank].clone(), every[rank].flatten()]).wait()
    for i, out in enumerate(outs):
        expect(out, wanted[rank], "reduce_scatter_tensor_coalesced", i)


@NRANKS
def test_reductions_as_methods_of_the_group(ranks: Any, nranks: int) -> None:
    ranks.run(group_methods, nranks)


def coalescing_manager() -> None:
    from torch.distributed.distributed_c10d import _coalescing_manager

    rank, nranks = dist.get_rank(), dist.get_world_size()
    every = [inputs((nranks, 2 + i), torch.float32, i) for i in range(3)]
    for async_ops in (False, True):
        mine = [tensors[rank].clone() for tensors in every]
        with _coalescing_manager(async_ops=async_ops) as manager:
            for tensor in mine:
                dist.all_reduce(tensor)
        if async_ops:
            manager.wait()
        for i, tensor in enumerate(mine):
            expect(tensor, reduced(every[i]), "all_reduce", i, async_ops)
        outs = [torch.empty(2 + i) for i in range(3)]
        with _coalescing_manager(async_ops=async_ops) as manager:
            for out, tensors in zip(outs, every):
                dist.reduce_scatter_tensor(out, tensors[rank].clone())
        if async_ops:
            manager.wait()
        for i, out in enumerate(outs):
            expect(out, reduced(every[i])[rank], "reduce_scatter_tensor", i, async_ops)


@pytest.mark.parametrize("nranks", [1, 3])
def test_reductions_in_the_coalescing_manager(ranks: Any, nranks: int) -> None:
    ranks.run(coalescing_manager, nranks)
