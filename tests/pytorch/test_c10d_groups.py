"""Groups: new_group, subgroups, split_group, device meshes; objects and barriers in them; destroying and starting again."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensors import expect, tell, told

from hfreduce.params import default_timeout

NRANKS = pytest.mark.parametrize("nranks", [1, 2, 3, 4])


def sum_in(group: Any) -> float:
    """The sum of the global ranks of a group."""
    tensor = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


# --- objects ---


def objects() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    everything: list[Any] = [{"rank": r, "data": list(range(r * 7))} for r in range(nranks)]
    got: list[Any] = [None] * nranks
    dist.all_gather_object(got, everything[rank])
    assert got == everything, got
    for root in range(nranks):
        got = [None] * nranks
        dist.gather_object(everything[rank], got if rank == root else None, root)
        assert rank != root or got == everything, (root, got)
        some = [everything[root], "text", None] if rank == root else [None] * 3
        dist.broadcast_object_list(some, root)
        assert some == [everything[root], "text", None], (root, some)
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, everything if rank == root else None, root)
        assert mine == [everything[rank]], (root, mine)


@NRANKS
def test_collectives_of_objects(ranks: Any, nranks: int) -> None:
    ranks.run(objects, nranks)


# --- barriers ---


def barrier_waits(how: str) -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    if rank == nranks - 1:
        time.sleep(0.3)
        tell("the last is here")
    if how == "barrier":
        dist.barrier()
    elif how == "async":
        dist.barrier(async_op=True).wait()
    elif how == "method":
        dist.group.WORLD.barrier().wait()
    else:
        dist.group.WORLD.monitored_barrier(timedelta(seconds=20))
    assert told("the last is here")


@pytest.mark.parametrize("nranks", [2, 4])
@pytest.mark.parametrize("how", ["barrier", "async", "method", "monitored"])
def test_barrier_waits_for_the_last(ranks: Any, nranks: int, how: str) -> None:
    ranks.run(barrier_waits, nranks, how)


def monitored_barrier_names(wait_all_ranks: bool) -> str:
    rank = dist.get_rank()
    group = dist.new_group([0, 1, 2], timeout=timedelta(seconds=30))
    text = ""
    if rank == 0:
        try:
            group.monitored_barrier(timedelta(seconds=0.5), wait_all_ranks=wait_all_ranks)
        except RuntimeError as error:
            text = str(error)
    dist.barrier()
    return text


@pytest.mark.parametrize(("wait_all_ranks", "named"), [(False, ["1"]), (True, ["1", "2"])], ids=["first", "all"])
def test_monitored_barrier_names_who_is_missing(ranks: Any, wait_all_ranks: bool, named: list[str]) -> None:
    text = ranks.run(monitored_barrier_names, 3, wait_all_ranks)[0]
    assert all(rank in text.replace("Rank 0", "") for rank in named), text


# --- groups of some of the ranks ---


def new_groups() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for members in ([0], [0, 2], [1, 3], [3, 1, 2], list(range(nranks))):
        group = dist.new_group(members)
        if rank not in members:
            assert dist.get_rank(group) == -1
            assert dist.all_reduce(torch.zeros(1), group=group) is None  # only warns
            continue
        assert dist.get_world_size(group) == len(members)
        assert dist.get_process_group_ranks(group) == sorted(members)
        assert dist.get_group_rank(group, rank) == dist.get_rank(group) == sorted(members).index(rank)
        assert dist.get_backend(group) == dist.get_backend()
        assert sum_in(group) == sum(members), members
        tensor = torch.tensor([float(rank)])
        dist.broadcast(tensor, max(members), group=group)  # src is a global rank
        assert tensor.item() == max(members), members
        tensor = torch.tensor([float(rank)])
        dist.broadcast(tensor, group=group, group_src=0)
        assert tensor.item() == min(members), members
        got = [torch.zeros(1) for _ in members]
        dist.all_gather(got, torch.tensor([float(rank)]), group=group)
        assert [each.item() for each in got] == sorted(members), members
        objects = [rank]
        dist.broadcast_object_list(objects, max(members), group=group)
        assert objects == [max(members)], members
        dist.destroy_process_group(group)
    assert sum_in(None) == sum(range(nranks))


def test_new_group(ranks: Any) -> None:
    ranks.run(new_groups, 4)


def overlapping_groups() -> None:
    """Operations of different groups may be under way at once, each rank waiting for its own in another order."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group([r, (r + 1) % nranks]) for r in range(nranks)]
    mine = [(r, groups[r]) for r in range(nranks) if rank in (r, (r + 1) % nranks)]
    for _ in range(5):
        tensors = {r: torch.full((1000,), float(rank)) for r, _ in mine}
        works = [(r, dist.all_reduce(tensors[r], group=group, async_op=True)) for r, group in mine]
        whole = torch.full((10,), float(rank))
        dist.all_reduce(whole)
        for r, work in works[:: 1 if rank % 2 else -1]:
            work.wait()
            expect(tensors[r], torch.full((1000,), float(r + (r + 1) % nranks)), "pair", r)
        expect(whole, torch.full((10,), float(sum(range(nranks)))), "world")


def test_overlapping_groups(ranks: Any) -> None:
    ranks.run(overlapping_groups, 4)


def many_groups() -> None:
    nranks = dist.get_world_size()
    groups = [dist.new_group(list(range(nranks))) for _ in range(32)]
    works, tensors = [], []
    for i, group in enumerate(groups):
        tensors.append(torch.full((100,), float(i)))
        works.append(dist.all_reduce(tensors[-1], group=group, async_op=True))
    for i, work in enumerate(works):
        work.wait()
        expect(tensors[i], torch.full((100,), float(i * nranks)), i)


def test_many_groups(ranks: Any) -> None:
    ranks.run(many_groups, 3)


def subgroups() -> None:
    rank = dist.get_rank()
    mine, groups = dist.new_subgroups(2)
    assert len(groups) == 2
    assert sum_in(mine) == (1 if rank < 2 else 5)
    mine, groups = dist.new_subgroups_by_enumeration([[0, 3], [2, 1]])
    assert len(groups) == 2
    assert sum_in(mine) == 3


def test_subgroups(ranks: Any) -> None:
    ranks.run(subgroups, 4)


def splits() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    parts = [[0, 2], [1]] if nranks == 3 else [[0, 1], [2, 3]]
    wanted = next(part for part in parts if rank in part)
    for _ in range(2):
        group = dist.group.WORLD.split_group(wanted, timedelta(seconds=30), group_desc="half")
        assert group.size() == len(wanted) and group.rank() == wanted.index(rank)
        tensor = torch.tensor([float(rank)])
        group.allreduce([tensor]).wait()
        assert tensor.item() == sum(wanted)
        group.barrier().wait()
    # a part alone: the others take part in the call with the ranks of their own
    group = dist.group.WORLD.split_group([rank])
    tensor = torch.tensor([float(rank)])
    group.allreduce([tensor]).wait()
    assert group.size() == 1 and tensor.item() == rank


@pytest.mark.parametrize("nranks", [3, 4])
def test_split_group_of_the_group(ranks: Any, nranks: int) -> None:
    ranks.run(splits, nranks)


def dist_split_group() -> str:
    """torch's function asks for a device that the group is bound to, which a CPU group is not."""
    try:
        group = dist.split_group(split_ranks=[[0, 1], [2, 3]])
    except RuntimeError as error:
        return str(error)
    assert sum_in(group) == (1 if dist.get_rank() < 2 else 5)
    return ""


def test_dist_split_group_works_or_says_why(ranks: Any) -> None:
    for text in ranks.run(dist_split_group, 4):
        assert not text or "bound" in text or "split" in text, text


def device_mesh() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    assert list(mesh.get_coordinate()) == [rank // 2, rank % 2]
    assert sum_in(mesh.get_group("dp")) == 2 * (rank % 2) + 2
    assert sum_in(mesh["tp"].get_group()) == 4 * (rank // 2) + 1
    assert dist.get_backend(mesh.get_group("tp")) == dist.get_backend()
    flat = mesh._flatten("all") if hasattr(mesh, "_flatten") else None
    if flat is not None:
        assert sum_in(flat.get_group()) == 6


def test_device_mesh(ranks: Any) -> None:
    ranks.run(device_mesh, 4)


# --- ends and beginnings ---


def start_again(times: int) -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    name, store = dist.get_backend(), dist.distributed_c10d._get_default_store()
    for i in range(times):
        if i % 2:
            dist.all_reduce(torch.ones(3), async_op=True)  # destroyed with an operation nobody waits for
        dist.destroy_process_group()
        assert not dist.is_initialized()
        dist.init_process_group(name, store=dist.PrefixStore(f"again-{i}", store), rank=rank, world_size=nranks)
        assert sum_in(None) == sum(range(nranks))


@pytest.mark.parametrize("nranks", [1, 2, 4])
def test_destroy_and_start_again(ranks: Any, nranks: int) -> None:
    ranks.run(start_again, nranks, 5)


def destroy_subgroup_keeps_the_rest() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    first, second = dist.new_group(list(range(nranks))), dist.new_group(list(range(nranks)))
    dist.destroy_process_group(first)
    if rank == 0:
        time.sleep(0.2)  # the others go on while one still leaves
    assert sum_in(second) == sum(range(nranks)) and sum_in(None) == sum(range(nranks))


def test_destroying_one_group_leaves_the_others(ranks: Any) -> None:
    ranks.run(destroy_subgroup_keeps_the_rest, 3)


def sequence_numbers() -> None:
    group: Any = dist.group.WORLD
    if type(group) is dist.ProcessGroup:  # torch's own has them of a few backends that it knows by name
        group = group._get_backend(torch.device("cpu"))
    group._set_sequence_number_for_group()
    first = group._get_sequence_number_for_group()
    for _ in range(3):
        dist.all_reduce(torch.ones(2))
    assert group._get_sequence_number_for_group() == first + 3


def test_sequence_numbers_count_collectives(ranks: Any) -> None:
    ranks.run(sequence_numbers, 2)


# --- groups beside torch.distributed ---


def group_of_a_store(timeout: Any) -> tuple[Any, ...]:
    import hfreduce.torch
    from hfreduce.errors import InvalidArgumentError

    rank, nranks = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    before = list(dist.distributed_c10d._world.pg_map)
    # in the other order, to tell these ranks from the default group's
    group = hfreduce.torch.create_process_group(dist.PrefixStore("mine", store), nranks - 1 - rank, nranks, timeout, name="mine")
    assert list(dist.distributed_c10d._world.pg_map) == before, "it must not be registered"
    tensor = torch.tensor([2.0 ** group.rank()])
    group.allreduce([tensor]).wait()
    root = torch.tensor([float(rank)])
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([root], options).wait()
    found = group.rank(), group.size(), tensor.item(), root.item()
    seconds = group.communicator.timeout
    group.shutdown()
    assert sum_in(None) == sum(range(nranks)), "the default group is as it was"
    with pytest.raises(InvalidArgumentError) as caught:
        hfreduce.torch.create_process_group(dist.PrefixStore("wrong", store), 5, 1)
    assert isinstance(caught.value, dist.DistBackendError)
    return (*found, seconds, str(caught.value))


@pytest.mark.parametrize(("timeout", "seconds"), [(20, 20.0), (timedelta(seconds=21), 21.0), (None, None)])
def test_group_without_init_process_group(ranks: Any, timeout: Any, seconds: float | None) -> None:
    for rank, (mine, size, total, root, limit, text) in enumerate(ranks.run(group_of_a_store, 3, timeout)):
        assert (mine, size, total, root) == (2 - rank, 3, 7.0, 2.0)
        assert limit == (seconds or default_timeout())
        assert "rank" in text and "5" in text
