"""The operations that reduce."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hfreduce._ffi import ffi, lib
from hfreduce.errors import (
    HfreduceError,
    InvalidArgumentError,
    MismatchError,
    check,
)
from hfreduce.torch.calls import operation, options_of, profiling
from hfreduce.torch.dtypes import CORE_OPS, NATIVE, Reduction, moved, op_name, reduction
from hfreduce.torch.group import DONE, Call, followed
from hfreduce.torch.moves import Moves
from hfreduce.torch.tensors import (
    address,
    dense,
    flattened,
    in_turn,
    is_dense,
    one,
    one_list,
    part_dtype,
    product,
)
from hfreduce.torch.tracing import untraced
from hfreduce.torch.work import CoalescedWork, Work

_tensor_all_reduce = lib.hfr_tensor_all_reduce
_all_reduce = lib.hfreduceAllReduce
_strided = torch.strided
_SUM = dist.ReduceOp.SUM


@untraced
class Reductions(Moves):
    """Needs Moves: sparse tensors are gathered."""

    # --- reductions ---

    def _reduction(self, tensor: Any, op: Any, opts: Any) -> tuple[Any, Reduction, int, list[Callable[[], None]]]:
        """(buffer to reduce in, how, core op number, what to call once it is issued)."""
        how = reduction(tensor.dtype, op)
        buffer = tensor.to(how.wider) if how.wider is not None else dense(tensor)
        if how.factor is None:
            return buffer, how, how.op, []
        scalar_type = torch.float32 if buffer.dtype.itemsize == 1 and buffer.dtype.is_floating_point else part_dtype(buffer.dtype)
        scalar = torch.tensor([how.factor], dtype=scalar_type)
        number = ffi.new("hfreduceRedOp_t *")
        pointer = self._handle.open()
        made = lib.hfreduceRedOpCreatePreMulSum(number, address(scalar), how.code, lib.hfreduceScalarHostImmediate, pointer)
        check(made, pointer)
        op_number = int(number[0])  # the call takes its factor along: the op can go once it is issued
        return buffer, how, op_number, [lambda: check(lib.hfreduceRedOpDestroy(op_number, pointer), pointer)]

    def _all_gathered(self, tensor: Any) -> Any:
        """Every rank's tensor, as the rows of one. Waits."""
        source = dense(tensor)
        rows = source.new_empty((self._size, *source.shape))
        code, count = moved(source)
        self._handle.issue(
            lib.hfreduceAllGather, (address(source), address(rows), count, code), (source, rows), None, False, None
        )
        return rows

    def _fold(self, tensor: Any, how: Reduction, target: Any, name: str, opts: Any) -> Work:
        """Reduce with an op that the core lacks: gather, and let torch fold the rows in rank order, the same on every rank."""
        source = dense(tensor)
        rows = source.new_empty((self._size, *source.shape))
        code, count = moved(source)

        def finish() -> None:
            if target is not None:
                target.copy_(functools.reduce(how.local, rows.unbind(0)))

        call = (lib.hfreduceAllGather, (address(source), address(rows), count, code))
        return self._run(name, [call], (tensor, source, rows), [tensor], opts, finish)

    def allreduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> Any:
        try:
            tensor = tensors[0] if type(tensors) is list else tensors
            if self._plain and opts is not None and not profiling():
                code = NATIVE.get(tensor.dtype)
                number = CORE_OPS.get(hash(opts.reduceOp))
                if (
                    code is not None
                    and number is not None
                    and self._coalescing is None
                    and tensor.is_cpu
                    and tensor.layout is _strided
                    and tensor.is_contiguous()
                    and not tensor.is_neg()
                    and len(tensors) == 1
                ):
                    handle = self._handle
                    if opts.asyncOp:
                        self._deadline(opts)
                        place = ffi.cast("void *", tensor.data_ptr())
                        core = handle.issue(_all_reduce, (place, place, tensor.numel(), code, number), tensor, None, True, None)
                        self._record("all_reduce", tensor.shape, tensor.dtype, core)
                        return Work(self, core, [tensor])
                    if self._seconds != self._default_seconds:
                        self._deadline(None)
                    self._record("all_reduce", tensor.shape, tensor.dtype, None)
                    result = _tensor_all_reduce(tensor.data_ptr(), tensor.numel(), code, number, handle.pointer)
                    if result == 0:
                        return DONE
                    if result == lib.hfreduceInProgress:
                        handle.wait_out(tensor, None)
                        return DONE
                    raise handle.failure(result)
        except HfreduceError as error:
            raise self._as_torch(error) from None
        except (AttributeError, IndexError, TypeError):
            pass  # other spellings of the arguments: below
        return self._allreduce(tensors, opts, op, timeout)

    @operation
    def _allreduce(self, tensors: Any, opts: Any, op: Any, timeout: Any) -> Any:
        opts = options_of(dist.AllreduceOptions, opts, op, timeout)
        tensor = one(tensors, "tensors")
        if isinstance(tensor, torch.Tensor) and tensor.is_cpu and tensor.layout is torch.sparse_coo:
            return self._sparse_allreduce(tensor, opts)
        return self._allreduce_all([self._checked(tensor)], opts, "all_reduce")

    def _allreduce_all(self, tensors: list[Any], opts: Any, name: str) -> Work:
        calls: list[Call] = []
        keep: list[Any] = []
        after: list[Callable[[], None]] = []
        finishes: list[Callable[[], None]] = []
        op = opts.reduceOp
        hows = [reduction(tensor.dtype, op) for tensor in tensors]
        if any(how.local is not None for how in hows):
            works = [self._fold(tensor, how, tensor, name, opts) for tensor, how in zip(tensors, hows)]
            return works[0] if len(works) == 1 else CoalescedWork(works)
        for tensor in tensors:
            buffer, how, number, then = self._reduction(tensor, op, opts)
            count = buffer.numel() * how.parts
            calls.append((lib.hfreduceAllReduce, (address(buffer), address(buffer), count, how.code, number)))
            keep += [tensor, buffer]
            after += then
            if buffer is not tensor:
                finishes.append(functools.partial(tensor.copy_, buffer))
        work = self._run(name, calls, keep, tensors, opts, in_turn(finishes))
        for release in after:
            release()
        return work

    @operation
    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.AllreduceCoalescedOptions()
        if not tensors:
            return DONE
        return self._allreduce_all(self._checked_all(tensors, "tensors"), opts, "all_reduce_coalesced")

    def _sparse_allreduce(self, tensor: Any, opts: Any) -> Work:
        """Sum of sparse COO tensors: gathers every rank's indices and values. Waits, as the sizes must be known first."""
        if hash(opts.reduceOp) != hash(dist.ReduceOp(_SUM)):
            raise InvalidArgumentError(f"op: {op_name(opts.reduceOp)} of sparse tensors is not defined; use SUM")
        if self._detail:
            self._compare("all_reduce_sparse", (tensor.shape,), tensor.dtype)
        self._record("all_reduce_sparse", tensor.shape, tensor.dtype, None)
        mine = tensor.coalesce()
        indices, values = mine.indices().contiguous(), mine.values().contiguous()
        head = torch.zeros(1 + 2 + 16, dtype=torch.int64)
        facts = [mine._nnz(), mine.sparse_dim(), mine.dense_dim(), *mine.shape]
        if len(facts) > len(head):
            raise InvalidArgumentError(f"tensor: {mine.dim()} dimensions; sparse all_reduce takes at most 16")
        head[: len(facts)] = torch.tensor(facts, dtype=torch.int64)
        heads = self._all_gathered(head)
        for rank, row in enumerate(heads.tolist()):
            if row[1:] != head.tolist()[1:]:
                raise MismatchError(
                    f"ranks disagree: rank {self._rank} has a sparse tensor of shape {list(mine.shape)} ({mine.sparse_dim()} sparse "
                    f"dimensions), rank {rank} of {row[3 : 3 + row[1] + row[2]]} ({row[1]})",
                    rank=self._rank,
                    peer=rank,
                )
        counts = [int(n) for n in heads[:, 0]]
        all_indices = self._gather_uneven(indices.t().contiguous(), [n * indices.shape[0] for n in counts])
        all_values = self._gather_uneven(
            values, [n * (values[0].numel() if len(values) else product(values.shape[1:])) for n in counts]
        )
        total = sum(counts)
        summed = torch.sparse_coo_tensor(
            all_indices.view(total, indices.shape[0]).t(), all_values.view(total, *values.shape[1:]), mine.shape
        ).coalesce()
        tensor.copy_(summed)
        return Work(self, None, [tensor])

    @operation
    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None, *, root: Any = None) -> Any:
        if isinstance(opts, int):
            root, opts = opts, None
        opts = options_of(dist.ReduceOptions, opts, op, timeout)
        if root is not None:
            opts.rootRank = root
        tensor = self._checked(one(tensors, "tensors"))
        root = self._root(opts.rootRank)
        how = reduction(tensor.dtype, opts.reduceOp)
        if how.local is not None:
            return self._fold(tensor, how, tensor if root == self._rank else None, "reduce", opts)
        buffer, how, number, after = self._reduction(tensor, opts.reduceOp, opts)
        count = buffer.numel() * how.parts
        target = address(buffer) if root == self._rank else ffi.NULL
        finish = functools.partial(tensor.copy_, buffer) if root == self._rank and buffer is not tensor else None
        call = (lib.hfreduceReduce, (address(buffer), target, count, how.code, number, root))
        work = self._run("reduce", [call], (tensor, buffer), [tensor], opts, finish)
        for release in after:
            release()
        return work

    @operation
    def _reduce_scatter_base(self, output: Any, input: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> Any:
        opts = options_of(dist.ReduceScatterOptions, opts, op, timeout)
        return self._reduce_scatter_all([(output, input)], opts, "reduce_scatter_tensor")

    @operation
    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.ReduceScatterOptions()
        self._count(len(outputs), len(inputs), "outputs", "as there are inputs,")
        return self._reduce_scatter_all(list(zip(outputs, inputs)), opts, "reduce_scatter_coalesced") if len(outputs) else DONE

    def _reduce_scatter_all(self, pairs: Sequence[tuple[Any, Any]], opts: Any, name: str) -> Any:
        calls: list[Call] = []
        keep: list[Any] = []
        after: list[Callable[[], None]] = []
        finishes: list[Callable[[], None]] = []
        for output, input in pairs:
            self._checked(output, "output")
            self._checked(input, "input")
            if output.dtype != input.dtype:
                raise InvalidArgumentError(f"output: dtype {output.dtype} differs from the input's {input.dtype}")
            self._count(
                input.numel(),
                self._size * output.numel(),
                "input",
                f"with {output.numel()} in the output of each of {self._size} ranks",
            )
            if reduction(input.dtype, opts.reduceOp).local is not None:
                calls, rows, finish = self._fold_part(output, input, reduction(input.dtype, opts.reduceOp), calls)
                keep += [output, input, rows]
                finishes.append(finish)
                continue
            buffer, how, number, then = self._reduction(input, opts.reduceOp, opts)
            target = output
            if how.wider is not None or not is_dense(output):
                target = torch.empty(output.shape, dtype=how.wider or output.dtype, device=output.device)
                finishes.append(functools.partial(output.copy_, target))
            calls.append(
                (lib.hfreduceReduceScatter, (address(buffer), address(target), target.numel() * how.parts, how.code, number))
            )
            keep += [output, input, buffer, target]
            after += then
        work = self._run(name, calls, keep, [output for output, _ in pairs], opts, in_turn(finishes))
        for release in after:
            release()
        return work

    def _fold_part(
        self, output: Any, input: Any, how: Reduction, calls: list[Call]
    ) -> tuple[list[Call], Any, Callable[[], None]]:
        """reduce_scatter with an op that the core lacks: every rank gets its part of everybody's, and folds."""
        source = dense(input)
        rows = source.new_empty((self._size, output.numel()))
        code, count = moved(rows)
        call = (lib.hfreduceAlltoAll, (address(source), address(rows), count // self._size, code))

        def finish() -> None:
            output.copy_(functools.reduce(how.local, rows.unbind(0)).view(output.shape))

        return [*calls, call], (source, rows), finish

    @operation
    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> Any:
        opts = options_of(dist.ReduceScatterOptions, opts, op, timeout)
        output = self._checked(one(outputs, "outputs"), "output")
        if isinstance(inputs[0], torch.Tensor):
            inputs = [inputs]
        parts = self._checked_all(one_list(inputs, "inputs"), "inputs", output.dtype)
        self._count(len(parts), self._size, "inputs", "as a list (its tensors counted),")
        self._count(parts[self._rank].numel(), output.numel(), f"inputs[{self._rank}]", "as the output of this rank")
        if len({part.numel() for part in parts}) == 1:
            flat = flattened(parts)
            return self._reduce_scatter_all([(output, flat)], opts, "reduce_scatter")
        how = reduction(output.dtype, opts.reduceOp)
        if how.local is not None:
            flat = flattened(parts)
            mine = sum(part.numel() for part in parts[: self._rank])
            summed = torch.empty_like(flat)
            work = self._fold(flat, how, summed, "reduce_scatter", opts)
            return followed(self, work, [output], lambda: output.copy_(summed[mine : mine + output.numel()].view(output.shape)))
        calls: list[Call] = []
        keep: list[Any] = [output]
        after: list[Callable[[], None]] = []
        finish = None
        for root, part in enumerate(parts):  # uneven: a reduce to each rank, as one
            buffer, how, number, then = self._reduction(part, opts.reduceOp, opts)
            target: Any = ffi.NULL
            if root == self._rank:
                place = output
                if how.wider is not None or not is_dense(output):
                    place = torch.empty(output.shape, dtype=how.wider or output.dtype, device=output.device)
                    finish = functools.partial(output.copy_, place)
                keep.append(place)
                target = address(place)
            calls.append((lib.hfreduceReduce, (address(buffer), target, buffer.numel() * how.parts, how.code, number, root)))
            keep += [part, buffer]
            after += then
        work = self._run("reduce_scatter", calls, keep, [output], opts, finish)
        for release in after:
            release()
        return work
