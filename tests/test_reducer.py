"""GradientReducer for NumPy: the mean of all ranks' gradients, whatever the order, the dtype, the buckets and what is missing."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

import hfreduce
from hfreduce.bucketing import place, plan

SHAPES = {"w1": (33, 17), "b1": (17,), "w2": (17, 5), "b2": (5,), "scale": (), "none": (0, 3)}
REVERSED = tuple(reversed(SHAPES))


def gradient(name: str, rank: int, step: int = 0, dtype: Any = np.float32) -> Any:
    """This rank's gradient: anyone can make anyone's."""
    seed = [list(SHAPES).index(name), rank, step]
    return np.asarray(np.random.default_rng(seed).standard_normal(SHAPES[name]), np.float32).astype(dtype)


def mean(name: str, nranks: int, step: int = 0, dtype: Any = np.float32) -> Any:
    return sum(gradient(name, rank, step, dtype).astype(np.float64) for rank in range(nranks)) / nranks


def same_everywhere(comm: hfreduce.Communicator, arrays: Any) -> None:
    """Identical bits on all ranks."""
    mine = np.concatenate([np.atleast_1d(array).ravel().view(np.uint8) for array in arrays])
    first = comm.broadcast(mine.copy(), root=0)
    assert (first == mine).all()


# --- the plan ---


def test_plan_closes_a_bucket_that_is_full() -> None:
    assert plan([4, 4, 4, 4, 4], "aaaaa", [4, 3, 2, 1, 0], 8) == [[4, 3], [2, 1], [0]]
    assert plan([4, 100, 4], "aaa", [2, 1, 0], 8) == [[2, 1], [0]]
    assert plan([4] * 3, "aaa", [2, 1, 0], 1) == [[2], [1], [0]]
    assert plan([], "", [], 8) == []


def test_plan_by_kind_in_the_order_of_the_last_member() -> None:
    assert plan([4] * 6, "ababab", [5, 4, 3, 2, 1, 0], 8) == [[5, 3], [4, 2], [1], [0]]
    assert plan([4] * 4, "abba", [0, 1, 2, 3], 100) == [[1, 2], [0, 3]]


def test_plan_has_every_parameter_once() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = int(rng.integers(0, 40))
        nbytes, kinds = rng.integers(0, 50, n).tolist(), rng.integers(0, 3, n).tolist()
        buckets = plan(nbytes, kinds, rng.permutation(n).tolist(), int(rng.integers(1, 100)))
        assert sorted(index for members in buckets for index in members) == list(range(n))
        assert all(len({kinds[index] for index in members}) == 1 for members in buckets)


def test_place_aligns() -> None:
    assert place([4, 64, 65, 0, 8]) == ([0, 64, 128, 256, 256], 320)


# --- steps ---


def _steps(comm: hfreduce.Communicator, bucket_bytes: int, op: str, dtype: Any, order: str) -> None:
    like = {name: np.zeros(shape, dtype) for name, shape in SHAPES.items()}
    reducer = hfreduce.GradientReducer(like, comm, bucket_bytes=bucket_bytes, op=op)
    assert all(reducer.views[name].shape == SHAPES[name] and reducer.views[name].dtype == dtype for name in SHAPES)
    names = {
        "backward": REVERSED,
        "forward": tuple(SHAPES),
        "by rank": np.random.default_rng(comm.rank).permutation(list(SHAPES)),
    }[order]
    for step in range(3):
        given = {name: gradient(name, comm.rank, step, dtype) for name in SHAPES}
        for i, name in enumerate(names):
            if i % 2:
                reducer.views[name][...] = given[name]
                reducer.ready(name)
            else:
                reducer.ready(name, given[name])
        views = reducer.synchronize()
        assert views is reducer.views and not reducer.active
        tolerance = {2: 2e-3, 4: 1e-6, 8: 1e-14}[np.dtype(dtype).itemsize] * (1 if op == "avg" else comm.nranks)
        for i, name in enumerate(names):
            expected = mean(name, comm.nranks, step, dtype) * (1 if op == "avg" else comm.nranks)
            np.testing.assert_allclose(views[name].astype(np.float64), expected, rtol=0, atol=tolerance)
            if not i % 2:
                np.testing.assert_array_equal(given[name], views[name])  # written back
        same_everywhere(comm, views.values())
    assert reducer.wait_seconds > 0
    reducer.close()
    reducer.close()


@pytest.mark.parametrize("nranks", [1, 2, 3])
@pytest.mark.parametrize("order", ["backward", "forward", "by rank"])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_steps(nranks: int, order: str, bucket_bytes: int) -> None:
    run_ranks(_steps, nranks, bucket_bytes, "avg", np.float32, order)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("op", ["avg", "sum"])
def test_dtypes_and_ops(dtype: Any, op: str) -> None:
    run_ranks(_steps, 2, 100, op, dtype, "backward")


def _mixed(comm: hfreduce.Communicator) -> None:
    import ml_dtypes

    kinds = [np.float32, ml_dtypes.bfloat16, np.float64, np.float16]
    like = [np.zeros(10 + i, kinds[i % 4]) for i in range(12)]
    with hfreduce.GradientReducer(like, comm, bucket_bytes=100) as reducer:
        for i in range(11, -1, -1):
            reducer.ready(i, np.full(10 + i, comm.rank + i, kinds[i % 4]))
        for i, view in enumerate(reducer.synchronize()):
            assert view.dtype == kinds[i % 4]
            assert (view.astype(np.float64) == i + (comm.nranks - 1) / 2).all()


def test_mixed_dtypes() -> None:
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    run_ranks(_mixed, 2)


def _shapes_only(comm: hfreduce.Communicator) -> None:
    reducer = hfreduce.GradientReducer([(3, 4), 5, ()], comm, dtype="float64")
    assert [view.shape for view in reducer.views] == [(3, 4), (5,), ()]
    assert all(view.dtype == np.float64 and not view.any() for view in reducer.views)
    reducer.ready(2, np.array(float(comm.rank)))
    reducer.ready(0, np.full((3, 4), float(comm.rank)))
    views = reducer.synchronize()
    assert (views[0] == 0.5).all() and views[2] == 0.5 and not views[1].any()


def test_shapes_instead_of_arrays() -> None:
    run_ranks(_shapes_only, 2)


def _missing(comm: hfreduce.Communicator) -> None:
    reducer = hfreduce.GradientReducer(SHAPES, comm, bucket_bytes=100)
    for step in range(4):
        # w1 only on rank 0, b1 on none, b2 in every second step, the rest everywhere
        has = {"w1": comm.rank == 0, "b1": False, "b2": step % 2 == 0}
        for name in REVERSED:
            reducer.views[name][...] = 1000  # not ready: not looked at
            if has.get(name, True):
                reducer.ready(name, gradient(name, comm.rank, step))
        views = reducer.synchronize()
        np.testing.assert_allclose(views["w1"], gradient("w1", 0, step) / comm.nranks, atol=1e-6)
        assert not views["b1"].any()
        np.testing.assert_allclose(views["b2"], mean("b2", comm.nranks, step) * (step % 2 == 0), atol=1e-6)
        np.testing.assert_allclose(views["w2"], mean("w2", comm.nranks, step), atol=1e-6)
        same_everywhere(comm, views.values())
    assert not any(view.any() for view in reducer.synchronize().values())  # a step without any gradient


@pytest.mark.parametrize("nranks", [2, 3])
def test_missing_gradients_count_as_zero(nranks: int) -> None:
    run_ranks(_missing, nranks)


def _accumulate(comm: hfreduce.Communicator, compress: str | None) -> None:
    reducer = hfreduce.GradientReducer(SHAPES, comm, bucket_bytes=100, compress=compress)
    for start in (0, 10):
        with reducer.no_sync():
            for step in (0, 1):
                for name in REVERSED:
                    reducer.ready(name, gradient(name, comm.rank, start + step))
            with reducer.no_sync():
                pass
            reducer.ready("w1", np.zeros(SHAPES["w1"]))
        for name in REVERSED:
            if name != "b2":  # what is in it was given inside no_sync
                reducer.ready(name, gradient(name, comm.rank, start + 2))
        views = reducer.synchronize()
        for name in SHAPES:
            expected = sum(mean(name, comm.nranks, start + step) for step in range(2 if name == "b2" else 3))
            np.testing.assert_allclose(views[name], expected, atol=2e-2 if compress else 1e-6)


@pytest.mark.parametrize("compress", [None, "bf16"])
def test_no_sync_accumulates(compress: str | None) -> None:
    run_ranks(_accumulate, 2, compress)


# --- 16 bits on the wire ---


def _compressed(comm: hfreduce.Communicator, compress: str, feedback: bool) -> float:
    reducer = hfreduce.GradientReducer(SHAPES, comm, bucket_bytes=100, compress=compress, error_feedback=feedback)
    total = np.zeros(SHAPES["w1"])
    # Rank 0 alone has something there: the result is half of what it sent, and not rounded once more.
    exact = gradient("w1", 0) / 2
    for _ in range(100):  # the same gradients each time: their rounding is the same each time, unless it is fed back
        for name in REVERSED:
            if name != "w1" or comm.rank == 0:
                reducer.ready(name, gradient(name, comm.rank))
        views = reducer.synchronize()
        np.testing.assert_allclose(views["b1"], mean("b1", 2), atol=3e-2 if compress == "bf16" else 4e-3)
        np.testing.assert_allclose(views["w1"], exact, atol=3e-2 if compress == "bf16" else 4e-3)
        same_everywhere(comm, views.values())
        total += views["w1"]
    return float(np.abs(total / 100 - exact).max())


@pytest.mark.parametrize("compress", ["fp16", "bf16"])
def test_compression_and_error_feedback(compress: str) -> None:
    plain = run_ranks(_compressed, 2, compress, False)[0]
    fed_back = run_ranks(_compressed, 2, compress, True)[0]
    assert plain > 0
    assert fed_back < plain / 10


def _special(comm: hfreduce.Communicator, compress: str) -> None:
    reducer = hfreduce.GradientReducer([(4,)], comm, op="sum", compress=compress, error_feedback=True)
    reducer.ready(0, np.array([np.nan, np.inf, 1e30 if compress == "fp16" else 3.4e38, 1.5], np.float32))
    (view,) = reducer.synchronize()
    assert np.isnan(view[0]) and np.isposinf(view[1]) and np.isposinf(view[2]) and view[3] == 1.5 * comm.nranks
    reducer.ready(0, np.array([1, 2, 3, 4], np.float32))  # no residue of the overflow
    (view,) = reducer.synchronize()
    assert view.tolist() == [comm.nranks * x for x in (1, 2, 3, 4)]


@pytest.mark.parametrize("compress", ["fp16", "bf16"])
def test_special_values_on_the_wire(compress: str) -> None:
    run_ranks(_special, 2, compress)


def _residual_waits(comm: hfreduce.Communicator) -> None:
    reducer = hfreduce.GradientReducer([(1,), (1,)], comm, compress="bf16", error_feedback=True)
    x = np.float32(1 + 2**-9)  # bf16 keeps 1
    for key in (0, 1):
        reducer.ready(key, np.array([x]))
    reducer.synchronize()
    reducer.ready(0, np.array([x]))
    views = reducer.synchronize()
    assert views[1] == 0  # a gradient that nobody has is zero, whatever its residual
    reducer.ready(1, np.array([np.float32(2**-9)]))
    assert reducer.synchronize()[1] == 2**-8  # and now the residual comes along


def test_residual_waits_for_its_gradient() -> None:
    run_ranks(_residual_waits, 2)


def test_conversions_round_to_nearest_even() -> None:
    from hfreduce.reducer import _decode, _encode

    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 1 << 17, np.uint64).astype(np.uint32).view(np.float32)
    wire, back = np.empty(x.size, np.uint16), np.empty_like(x)
    for kind, dtype in (("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)):
        _encode(x, wire, kind)
        _decode(wire, back, kind)
        with np.errstate(over="ignore", invalid="ignore"):
            np.testing.assert_array_equal(back, x.astype(dtype).astype(np.float32))


# --- what is wrong ---


def _wrong(comm: hfreduce.Communicator) -> None:
    for options, words in [
        ({"op": "max"}, "op"),
        ({"compress": "fp8"}, "compress"),
        ({"error_feedback": True}, "error_feedback"),
        ({"bucket_bytes": 0}, "bucket_bytes"),
        ({"dtype": "int32"}, "int32"),
    ]:
        with pytest.raises(hfreduce.InvalidArgumentError, match=words):
            hfreduce.GradientReducer([(2,)], comm, **options)
    with pytest.raises(hfreduce.InvalidArgumentError, match="neither"):
        hfreduce.GradientReducer(["ab"], comm)
    with pytest.raises(hfreduce.InvalidArgumentError, match="Communicator"):
        hfreduce.GradientReducer([(2,)], None)
    reducer = hfreduce.GradientReducer({"a": (2,), "b": (3,)}, comm)
    with pytest.raises(hfreduce.InvalidArgumentError, match="'c'"):
        reducer.ready("c")
    with pytest.raises(hfreduce.InvalidArgumentError, match=r"\(2, 1\)"):
        reducer.ready("a", np.zeros((2, 1)))
    with pytest.raises(TypeError):
        reducer.ready("a", np.zeros(2, np.complex64))
    reducer.ready("a", np.ones(2))
    assert reducer.active
    with pytest.raises(hfreduce.InvalidUsageError, match=r"'a'.*no_sync"):
        reducer.ready("a", np.ones(2))
    assert (reducer.synchronize()["a"] == 1).all()  # the step goes on as if nothing had happened
    reducer.close()
    for call in (lambda: reducer.ready("a"), reducer.synchronize):
        with pytest.raises(hfreduce.InvalidUsageError, match="closed"):
            call()
    assert float(comm.all_reduce(np.ones(1))[0]) == comm.nranks  # the given communicator is as it was


def test_wrong_arguments() -> None:
    run_ranks(_wrong, 2)


def _differ(comm: hfreduce.Communicator, what: str) -> str:
    shapes: dict[str, Any] = dict(SHAPES)
    options: dict[str, Any] = {}
    if comm.rank == 1:
        if what == "shape":
            shapes["w2"] = (17, 6)
        elif what == "number":
            del shapes["none"]
        else:
            options["op"] = "sum"
    with pytest.raises(hfreduce.MismatchError) as caught:
        hfreduce.GradientReducer(shapes, comm, **options)
    assert caught.value.peer == 1 - min(comm.rank, 1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [("shape", ["'w2' (17, 6)", "'w2' (17, 5)"]), ("number", ["nothing more", "'none'"]), ("op", ["op sum", "op avg"])],
)
def test_ranks_differ(what: str, words: list[str]) -> None:
    messages = set(run_ranks(_differ, 3, what))
    assert len(messages) == 1
    (message,) = messages
    assert "rank 1 has" in message and all(word in message for word in words)


def _dies(comm: hfreduce.Communicator) -> tuple[str, int | None]:
    reducer = hfreduce.GradientReducer([(1000,)] * 4, comm, bucket_bytes=1)
    try:  # all of it: a rank may hear of the death before it has come as far
        for key in (3, 2):
            reducer.ready(key, np.ones(1000))
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for key in (1, 0):
            reducer.ready(key, np.ones(1000))
        reducer.synchronize()
    except hfreduce.PeerLostError as error:
        reducer.close()
        return str(error), error.peer
    raise AssertionError("nothing was noticed")


@pytest.mark.limit(60)
def test_a_rank_that_dies_in_a_step() -> None:
    outcomes = run_ranks(_dies, 3, check=False)
    assert not outcomes[1].ok
    for rank in (0, 2):
        assert outcomes[rank].ok, outcomes[rank]
        text, peer = outcomes[rank].value
        assert peer == 1 and "rank 1" in text and outcomes[rank].seconds < 8


def _left(comm: hfreduce.Communicator) -> str:
    try:  # all of it: the other's abort may come before this rank has got as far
        with hfreduce.GradientReducer([(1000,)] * 2, comm, bucket_bytes=1) as reducer:
            if comm.rank == 1:
                reducer.ready(1, np.ones(1000))
                raise KeyError("a bug in the backward pass")
            end = time.monotonic() + 8
            while reducer.comm.async_error() is None and time.monotonic() < end:
                time.sleep(0.01)
            reducer.ready(1, np.ones(1000))
            reducer.synchronize()
    except hfreduce.AbortedError as error:
        return str(error)
    return "nothing"


@pytest.mark.limit(60)
def test_a_rank_that_leaves_in_a_step() -> None:
    """It does not wait for the others to come to what it has begun, and they hear of it at once."""
    outcomes = run_ranks(_left, 2, check=False)
    assert isinstance(outcomes[1].error, KeyError)
    assert outcomes[0].ok and "rank 1" in outcomes[0].value, outcomes[0]
