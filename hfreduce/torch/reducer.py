"""GradientReducer: averages gradients over the ranks during the backward pass, for training loops of one's own."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from hfreduce._ffi import ffi, lib
from hfreduce.bucketing import BUCKET_BYTES, WIRE, Bucket, Segment, Step, launch, place, plan, require_same
from hfreduce.buffer import tensor_address
from hfreduce.communicator import Communicator
from hfreduce.errors import InvalidArgumentError, InvalidUsageError
from hfreduce.memory import zeros
from hfreduce.torch.streams import Ordered, Streams, device_of, handle_of
from hfreduce.types import dtype_code
from hfreduce.work import Work

#: Gradients of so many bytes and more are reduced where autograd left them; smaller ones are packed, which costs less than a
#: collective each.
DIRECT_BYTES = 64 << 10

# dtype -> (the datatype that goes on the wire, how many of them an element has)
_KINDS: dict[Any, tuple[int, int]] = {
    torch.float16: (lib.hfreduceFloat16, 1),
    torch.bfloat16: (lib.hfreduceBfloat16, 1),
    torch.float32: (lib.hfreduceFloat32, 1),
    torch.float64: (lib.hfreduceFloat64, 1),
    torch.complex64: (lib.hfreduceFloat32, 2),
    torch.complex128: (lib.hfreduceFloat64, 2),
}
_WIRE_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}

_is_grad_enabled = torch.is_grad_enabled
_cast = ffi.cast
_POINTER = ffi.typeof("void *")
_STRIDED: Any = torch.strided


def _count_holders() -> Callable[[Any], bool]:
    """Make the function that says whether a tensor is the only one to hold its memory.

    Autograd may put a tensor into .grad whose memory other tensors share (the parts of a torch.cat, say), and read these on.
    Such memory must not be written before the backward pass is over.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return lambda tensor: False
    sample = torch.empty(1)
    one = count(sample.untyped_storage()._cdata)  # the call itself is a holder
    return lambda tensor: bool(count(tensor.untyped_storage()._cdata) == one)


_is_sole_holder = _count_holders()


def _usable(grad: Any, dtype: Any, stride: tuple[int, ...]) -> bool:
    """Whether a gradient can be reduced where it lies."""
    return (
        grad.layout is _STRIDED
        and grad.dtype is dtype
        and grad.stride() == stride
        and not (grad.is_neg() or grad.is_conj())
        and _is_sole_holder(grad)
    )


class _Bucket(Bucket):
    """A bucket, and where its gradients are reduced.

    packed: (parameter, view of `memory`), all reduced at once. direct: (parameter, stride), each reduced where it lies.
    wire: the views are of 16 bits, and the gradients are converted to and fro.
    """

    segment: Segment | None = None
    residual: Any = None  # the views' like in float32: what the conversion lost
    residual_views: tuple[Any, ...] = ()
    memory: Any = None  # the flat tensor that the views are of

    def __init__(self, members: list[int], wire: bool) -> None:
        super().__init__(members)
        self.wire = wire
        self.packed: list[tuple[int, Any]] = []
        self.direct: list[tuple[int, tuple[int, ...]]] = []
        self.segments: list[Segment] = []  # of the step before, kept for their length only
        self.absent: list[tuple[int, Any]] = []  # (parameter without a gradient here, the others' sum)
        self.back: list[tuple[Any, Any]] = []  # (gradient, result): to be copied


class GradientReducer(Step):
    """Reduces the gradients of parameters over the ranks, while backward makes more of them.

        reducer = hfreduce.torch.GradientReducer(model.parameters())
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()     # a bucket's all_reduce starts when its last gradient is there
            reducer.synchronize()                       # the gradients are now the mean over all ranks
            optimizer.step()

    params: parameters, (name, parameter) pairs, or a module; alike on all ranks. Those with requires_grad False are left out;
    one that comes twice counts once. float16, bfloat16, float32, float64, complex, all on the CPU or all on one CUDA device;
    sparse gradients are refused.
    bucket_bytes: gradients are reduced in buckets of about so many bytes and one dtype: in the first step in the reverse order
    of `params`, then in the order in which rank 0's became ready.
    op: "avg" or "sum". With "sum" gradients must be zeroed (or None) before each step.
    group, comm: whose ranks: a torch process group, or a hfreduce.Communicator; by default the group of all ranks, and where
    torch.distributed is not initialised hfreduce.init(). The reducer works on a communicator of its own.
    compress: "fp16" or "bf16" sends float32 gradients so (the sum is made in float32, and rounded once a node); fp16 has its
    limit at 65504. error_feedback: what the rounding of this rank's gradients lost is added to them in the next step.

    Which gradients there are may differ by step and rank. One that is None here and not elsewhere gets the result, zero being
    counted for here; one that is None everywhere stays None. One that is not None takes part even if backward did not touch it.
    Values made by hand count as well: what is in .grad at `synchronize`, or earlier with `ready`.

    On a CUDA device the reductions run in the order of streams, and `synchronize` has the current stream wait for them. The
    host waits only on a rank with a gradient that is None, since it must learn whether others have one.

    After `synchronize`, .grad may be a view of a bucket, which the next step overwrites. Between backward and `synchronize`
    it must neither be read nor written. create_graph=True is not supported. All ranks get identical bits.

    Errors, from backward too: MismatchError if the ranks' parameters or options differ; those of Communicator.all_reduce.
    A gradient that changes after its bucket started raises InvalidUsageError: see `no_sync`. When backward fails on a rank
    that wants to go on, it calls `synchronize` (what is missing counts as zero), as the others do; else `close`, or ends.
    """

    _hint = "; checkpointing a part whose parameters are used elsewhere too needs use_reentrant=False"

    def __init__(
        self,
        params: Any,
        bucket_bytes: int = BUCKET_BYTES,
        op: str = "avg",
        group: Any = None,
        comm: Communicator | None = None,
        *,
        compress: str | None = None,
        error_feedback: bool = False,
    ) -> None:
        """Compare the ranks' parameters, make the buckets, register the hooks. Collective."""
        named = _unique(params)
        self._params = [param for _, param in named]
        self._strides = [_layout(param) for param in self._params]
        self._device = device_of(self._params, "params")  # None: the CPU
        self._streams = Streams()
        self._flags_work: Work | None = None  # on a device, the flags go beside the last bucket
        own = None
        if comm is None:
            comm, own = _communicator(group)
        elif group is not None:
            raise InvalidArgumentError("comm: give a group or a communicator, not both")
        super().__init__(comm, [name for name, _ in named], op, compress, error_feedback, bucket_bytes)
        self._given = own  # closed with the reducer
        self._compress = compress
        self._feedback = error_feedback
        self._bucket_bytes = bucket_bytes
        self._new_flags()
        self._learning: list[int] | None = []  # the order of the first step's gradients
        self._on_begin: Callable[[], None] | None = None  # told when a step's first gradient is ready
        self._queued = False  # synchronize is to run at the end of this backward pass (DistributedDataParallel)
        self._handles: list[Any] = []
        options = f"op {op}, bucket_bytes {bucket_bytes}, compress {compress}, error_feedback {error_feedback}"
        lines = [
            f"{name} {tuple(param.shape)} {str(param.dtype).partition('.')[2]}, strides {stride}"
            for (name, param), stride in zip(named, self._strides)
        ]
        try:
            require_same(self._comm, [options, *lines], "the reducer's parameters")
        except BaseException:
            self.close()
            raise
        self._make_buckets(range(len(named) - 1, -1, -1))
        self._register()

    def _new_flags(self) -> None:
        count = len(self._params)
        self._flags = np.ones(count, np.uint8)  # 1: the parameter has a gradient, here or (in the end) on any rank
        self._flags_segment = (ffi.from_buffer("char[]", self._flags), count, lib.hfreduceUint8, lib.hfreduceMax)

    # --- buckets ---

    def _make_buckets(self, order: Iterable[int]) -> None:
        params = self._params
        nbytes = [param.numel() * param.element_size() for param in params]
        residuals = {
            index: residual
            for bucket in self._buckets
            if bucket.residual is not None
            for (index, _), residual in zip(bucket.packed, bucket.residual_views)
        }
        buckets = []
        for members in plan(nbytes, [param.dtype for param in params], list(order), self._bucket_bytes):
            dtype = params[members[0]].dtype
            bucket = _Bucket(members, wire=self._compress is not None and dtype == torch.float32)
            packed = [index for index in members if bucket.wire or nbytes[index] < DIRECT_BYTES]
            bucket.direct = [(index, self._strides[index]) for index in members if index not in set(packed)]
            if packed:
                self._pack(bucket, packed, dtype)
                if bucket.wire and self._feedback:
                    bucket.residual = torch.zeros(bucket.memory.numel(), device=self._device)
                    bucket.residual_views = self._views(bucket.residual, packed)
                    for index, view in zip(packed, bucket.residual_views):
                        if index in residuals:
                            view.copy_(residuals[index])
            buckets.append(bucket)
        self._use(buckets)

    def _pack(self, bucket: _Bucket, packed: list[int], dtype: Any) -> None:
        code, factor = _KINDS[dtype]
        if bucket.wire:
            assert self._compress is not None
            dtype, code = _WIRE_DTYPE[self._compress], WIRE[self._compress]
        size = torch.empty((), dtype=dtype).element_size()
        _, total = place([self._params[index].numel() * size for index in packed])
        if self._device is None:
            memory = torch.from_numpy(zeros(total, "uint8"))
        else:
            memory = torch.zeros(total, dtype=torch.uint8, device=self._device)
        bucket.memory = memory.view(dtype)
        bucket.packed = list(zip(packed, self._views(bucket.memory, packed)))
        pointer = _cast(_POINTER, bucket.memory.data_ptr())
        bucket.segment = (pointer, bucket.memory.numel() * factor, code, self._op)

    def _views(self, flat: Any, packed: list[int]) -> tuple[Any, ...]:
        """Parts of `flat` with the parameters' shapes and strides."""
        size = flat.element_size()
        offsets, _ = place([self._params[index].numel() * size for index in packed])
        return tuple(
            flat.as_strided(self._params[index].shape, self._strides[index], offset // size)
            for index, offset in zip(packed, offsets)
        )

    # --- hooks ---

    def _register(self) -> None:
        self_ref = weakref.ref(self)  # the parameters do not keep the reducer alive

        def make(index: int) -> Callable[[Any], None]:
            def hook(_: Any) -> None:
                reducer = self_ref()
                if reducer is not None and reducer._syncing:
                    reducer._hooked(index)

            return hook

        self._handles = [param.register_post_accumulate_grad_hook(make(i)) for i, param in enumerate(self._params)]
        weakref.finalize(self, _remove, self._handles)

    def _hooked(self, index: int) -> None:
        if not self._active and self._on_begin is not None:
            self._on_begin()
        if self._learning is not None:
            self._learning.append(index)
        self._mark(index)

    def ready(self, param: Any) -> None:
        """Say that param.grad is there, when it was made by hand and not by backward. Starts the buckets that are complete now."""
        self._check_open()
        for index, each in enumerate(self._params):
            if each is param:
                if self._syncing:
                    self._hooked(index)
                return
        raise InvalidArgumentError("param: it is not one of the reducer's parameters")

    def _again(self, index: int, bucket: Any) -> None:
        if bucket.work is not None:
            super()._again(index, bucket)

    # --- a bucket's course ---

    def _start(self, bucket: _Bucket) -> Any:
        if _is_grad_enabled():
            with torch.no_grad():
                return self._fill(bucket)
        return self._fill(bucket)

    def _fill(self, bucket: _Bucket) -> Any:
        segments: list[Segment] = []
        keep: list[Any] = [bucket]
        if bucket.segment is not None:
            if bucket.wire:
                self._compressed(bucket)
            else:
                self._packed(bucket)
            segments.append(bucket.segment)
        if bucket.direct:
            op, params = self._op, self._params
            for index, stride in bucket.direct:
                tensor = params[index].grad
                if tensor is None or not _usable(tensor, params[index].dtype, stride):
                    tensor = self._copied(bucket, index, tensor)
                code, factor = _KINDS[tensor.dtype]
                segments.append((_cast(_POINTER, tensor.data_ptr()), tensor.numel() * factor, code, op))
                keep.append(tensor)
        if self._device is not None:
            return self._fill_on_device(bucket, segments, keep)
        if bucket is self._buckets[-1]:  # of the gradients of all buckets, as it is the last to start
            segments.append(self._flags_segment)
        return launch(self._comm, segments, keep)

    def _fill_on_device(self, bucket: _Bucket, segments: list[Segment], keep: list[Any]) -> Ordered:
        stream = self._streams.of(self._device, "all_reduce", False)
        work = Ordered(launch(self._comm, segments, keep, handle_of(stream)), self._device, stream)
        for tensor in keep[1:]:
            tensor.record_stream(stream)
        if bucket is self._buckets[-1]:
            self._flags_work = launch(self._comm, [self._flags_segment], self._flags)
        return work

    def _packed(self, bucket: _Bucket) -> None:
        params = self._params
        moved, views, grads = [], [], []
        for index, view in bucket.packed:
            param = params[index]
            grad = param.grad
            if grad is view:
                continue
            if grad is None:
                view.zero_()
                self._flags[index] = 0
                bucket.absent.append((index, view))
                continue
            if grad.layout is not _STRIDED:
                raise self._sparse(index, grad)
            views.append(view)
            grads.append(grad)
            if grad.dtype is view.dtype:
                moved.append((param, view))
            else:
                bucket.back.append((grad, view))
        if views:
            torch._foreach_copy_(views, grads)
        for param, view in moved:
            param.grad = view

    def _copied(self, bucket: _Bucket, index: int, grad: Any) -> Any:
        """A tensor to reduce in place of a gradient that is None, or whose memory cannot be used."""
        param = self._params[index]
        tensor = torch.empty_strided(param.shape, self._strides[index], dtype=param.dtype, device=self._device)
        if grad is None:
            self._flags[index] = 0
            bucket.absent.append((index, tensor))
            return tensor.zero_()
        if grad.layout is not _STRIDED:
            raise self._sparse(index, grad)
        tensor.copy_(grad)
        if grad.dtype is tensor.dtype:
            param.grad = tensor
        else:
            bucket.back.append((grad, tensor))
        return tensor

    def _compressed(self, bucket: _Bucket) -> None:
        views, grads, residuals = [], [], []
        for i, (index, view) in enumerate(bucket.packed):
            grad = self._params[index].grad
            if grad is None:
                self._flags[index] = 0
                bucket.absent.append((index, view))
                continue
            if grad.layout is not _STRIDED:
                raise self._sparse(index, grad)
            views.append(view)
            grads.append(grad)
            if bucket.residual is not None:
                residuals.append(bucket.residual_views[i])
        for _, view in bucket.absent:
            view.zero_()
        if residuals:
            torch._foreach_add_(residuals, grads)
            torch._foreach_copy_(views, residuals)
            for residual, view in zip(residuals, views):
                residual -= view
                residual.nan_to_num_(0.0, 0.0, 0.0)  # an overflow is not carried on
        elif views:
            torch._foreach_copy_(views, grads)
        bucket.back = list(zip(grads, views))

    def _sparse(self, index: int, grad: Any) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"the gradient of {self._names[index]} has layout {grad.layout}; only dense gradients are reduced: use "
            f"sparse=False in the embedding, or leave this parameter out and all_gather its rows"
        )

    def synchronize(self) -> None:
        """End the step: start the buckets that have not started, wait for all; .grad then is the result. Collective.

        Every rank calls it once a step, whatever gradients it has. Raises what the all_reduces raised; close the reducer then.
        """
        with torch.no_grad():
            super().synchronize()
        if self._learning is not None:
            self._learn(self._learning)

    def _finish(self, bucket: _Bucket) -> None:
        if bucket.back:
            grads, results = zip(*bucket.back)
            torch._foreach_copy_(grads, results)

    def _end(self) -> None:
        if self._flags_work is not None and any(bucket.absent for bucket in self._buckets):
            self._flags_work.wait()
        for bucket in self._buckets:
            for index, result in bucket.absent:
                if self._flags[index]:
                    self._params[index].grad = result.float() if bucket.wire else result

    def _reset(self) -> None:
        super()._reset()
        self._queued = False
        if self._flags_work is None:
            self._flags.fill(1)
        else:  # it may still run
            self._new_flags()
            self._flags_work = None
        for bucket in self._buckets:
            bucket.absent, bucket.back = [], []

    def _learn(self, mine: list[int]) -> None:
        """Order the buckets as rank 0's gradients became ready in the first step; those that did not come last."""
        self._learning = None
        launched = [index for bucket in self._buckets for index in bucket.members]
        order = np.array(list(dict.fromkeys(mine + launched)), np.int32)
        self._comm.broadcast(order, root=0)
        self._make_buckets(order.tolist())

    # --- the end ---

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate: backward passes inside start nothing; the first one outside reduces all that is in .grad."""
        with super().no_sync():
            yield

    def close(self) -> None:
        """Remove the hooks, leave and free; closing twice is legal. In the middle of a step its all_reduces are aborted everywhere."""
        _remove(self._handles)
        super().close()
        if self._given is not None:
            self._given.close()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _unique(params: Any) -> list[tuple[str, Any]]:
    """(name, parameter) of what requires a gradient, each once. InvalidArgumentError for what cannot be reduced."""
    if isinstance(params, torch.nn.Module):
        params = params.named_parameters()
    elif isinstance(params, torch.Tensor):
        params = [params]
    found: dict[int, tuple[str, Any]] = {}
    for i, each in enumerate(params):
        name, param = each if isinstance(each, tuple) and len(each) == 2 else (f"#{i}", each)
        if not isinstance(param, torch.Tensor):
            raise InvalidArgumentError(f"params: {name} is a {type(param).__name__}, not a tensor")
        if not param.requires_grad or id(param) in found:
            continue
        if not param.is_leaf:
            raise InvalidArgumentError(f"params: {name} is not a leaf: its gradient is not kept")
        if not param.is_cpu and not param.is_cuda:
            raise InvalidArgumentError(f"params: {name} is on device {param.device}; only CPU and CUDA tensors are reduced")
        tensor_address(param, f"params: {name}")  # says whose memory is not its own
        if param.layout is not torch.strided or param.dtype not in _KINDS:
            dtype_code(param.dtype, f"params: {name}")  # says what is supported
            raise InvalidArgumentError(
                f"params: {name} has layout {param.layout} and dtype {param.dtype}, which is not supported"
            )
        found[id(param)] = (str(name), param)
    if not found:
        raise InvalidArgumentError("params: none of them requires a gradient")
    return list(found.values())


def _layout(param: Any) -> tuple[int, ...]:
    """Strides of the gradients that autograd makes: the parameter's if it is dense, else those of a contiguous tensor."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(param.stride(), param.shape) if size != 1):
        if stride != expected:
            return tuple(torch.empty(param.shape, device="meta").stride())
        expected *= size
    return tuple(param.stride())


def _communicator(group: Any) -> tuple[Communicator, Communicator | None]:
    """The communicator of a process group's ranks; and it once more, if it was made here and is the reducer's to close."""
    import torch.distributed as dist

    import hfreduce.torch as package
    from hfreduce.launch import init
    from hfreduce.unique_id import get_unique_id

    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise InvalidUsageError("group: torch.distributed is not initialised")
        made = init()
        return made, made
    try:
        return package.communicator(group), None
    except (AttributeError, TypeError):  # a group of another backend, which then carries the id to all
        ids = [bytes(get_unique_id())] if dist.get_rank(group) == 0 else [None]
        root = 0 if group is None else dist.get_global_rank(group, 0)
        dist.broadcast_object_list(ids, src=root, group=group)
        made = Communicator(dist.get_rank(group), dist.get_world_size(group), ids[0])
        return made, made
