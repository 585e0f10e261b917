"""The operations that move data: broadcast, gather, scatter, all-to-all in their many forms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hfreduce._ffi import ffi, lib
from hfreduce.errors import (
    InvalidArgumentError,
)
from hfreduce.torch.calls import AllgatherOptions, operation, options_of
from hfreduce.torch.dtypes import moved
from hfreduce.torch.group import DONE, Call, Group
from hfreduce.torch.tensors import (
    address,
    adjacent,
    dense,
    displacements,
    flattened,
    in_turn,
    is_dense,
    move_code,
    one,
    one_list,
    scatter_back,
)
from hfreduce.torch.tracing import untraced
from hfreduce.torch.work import Work


@untraced
class Moves(Group):
    """Needs Group."""

    def _gather_uneven(self, mine: Any, counts: Sequence[int]) -> Any:
        """All ranks' flat tensors one after the other; rank r has counts[r] elements. Waits."""
        out = mine.new_empty(sum(counts))
        call = self._gatherv(mine, out, counts)
        self._handle.issue(call[0], call[1], (mine, out), None, False, None)
        return out

    def _gatherv(self, mine: Any, out: Any, counts: Sequence[int]) -> Call:
        """all_gather of uneven parts: an uneven all_to_all in which every rank sends the same to all."""
        code, parts = move_code(mine)
        n = mine.numel() * parts
        send = [n] * self._size
        recv = [count * parts for count in counts]
        return lib.hfreduceAlltoAllv, (
            address(mine),
            ffi.new("size_t[]", send),
            ffi.new("size_t[]", self._size),
            address(out),
            ffi.new("size_t[]", recv),
            ffi.new("size_t[]", displacements(recv)),
            code,
        )

    # --- moving ---

    @operation
    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None, *, root: Any = None) -> Any:
        if isinstance(opts, int):
            root, opts = opts, None
        opts = options_of(dist.BroadcastOptions, opts, None, timeout)
        if root is not None:
            opts.rootRank = root
        tensor = self._checked(one(tensors, "tensors"))
        root = self._root(opts.rootRank)
        buffer = dense(tensor)
        code, count = moved(buffer)
        finish = functools.partial(tensor.copy_, buffer) if buffer is not tensor and root != self._rank else None
        call = (lib.hfreduceBroadcast, (address(buffer), address(buffer), count, code, root))
        return self._run("broadcast", [call], (tensor, buffer), [tensor], opts, finish)

    @operation
    def _allgather_base(self, output: Any, input: Any, opts: Any = None, timeout: Any = None) -> Any:
        opts = options_of(dist.AllgatherOptions if hasattr(dist, "AllgatherOptions") else AllgatherOptions, opts, None, timeout)
        call, keep, finish = self._all_gather_call(output, input)
        return self._run("all_gather_into_tensor", [call], keep, [output], opts, finish)

    def _all_gather_call(self, output: Any, input: Any) -> tuple[Call, tuple[Any, ...], Callable[[], None] | None]:
        self._checked(output, "output")
        self._checked(input, "input")
        if output.dtype != input.dtype:
            raise InvalidArgumentError(f"output: dtype {output.dtype} differs from the input's {input.dtype}")
        self._count(
            output.numel(),
            self._size * input.numel(),
            "output",
            f"with {input.numel()} in the input of each of {self._size} ranks",
        )
        source, target = (
            dense(input),
            output if is_dense(output) else torch.empty_like(output, memory_format=torch.contiguous_format),
        )
        code, count = moved(source)
        finish = None if target is output else functools.partial(output.copy_, target)
        return (lib.hfreduceAllGather, (address(source), address(target), count, code)), (output, input, source, target), finish

    @operation
    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else AllgatherOptions()
        self._count(len(outputs), len(inputs), "outputs", "as there are inputs,")
        made = [self._all_gather_call(output, input) for output, input in zip(outputs, inputs)]
        if not made:
            return DONE
        finish = in_turn([finish for _, _, finish in made if finish is not None])
        return self._run(
            "all_gather_coalesced", [call for call, _, _ in made], [keep for _, keep, _ in made], list(outputs), opts, finish
        )

    @operation
    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> Any:
        opts = options_of(AllgatherOptions, opts, None, timeout)
        input = self._checked(one(inputs, "inputs"), "input")
        if isinstance(outputs[0], torch.Tensor):
            outputs = [outputs]
        parts = self._checked_all(one_list(outputs, "outputs"), "outputs", input.dtype)
        return self._gather_lists([(parts, input)], opts, "all_gather")

    @operation
    def allgather_coalesced(self, output_lists: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else AllgatherOptions()
        # [rank][i]: the i-th tensor of every rank
        pairs = []
        for i, input in enumerate(self._each(inputs, "inputs")):
            pairs.append((self._checked_all([ranks[i] for ranks in output_lists], "outputs", input.dtype), input))
        return self._gather_lists(pairs, opts, "all_gather_coalesced") if pairs else DONE

    def _each(self, tensors: Sequence[Any], name: str) -> list[Any]:
        return [self._checked(tensor, f"{name}[{i}]") for i, tensor in enumerate(tensors)]

    def _gather_lists(self, pairs: Sequence[tuple[list[Any], Any]], opts: Any, name: str) -> Work:
        calls: list[Call] = []
        keep: list[Any] = []
        finishes: list[Callable[[], None]] = []
        outputs: list[Any] = []
        for parts, input in pairs:
            self._count(len(parts), self._size, "outputs", "as a list (its tensors counted),")
            self._count(parts[self._rank].numel(), input.numel(), f"outputs[{self._rank}]", "as the input of this rank")
            source, counts = dense(input), [part.numel() for part in parts]
            direct = adjacent(parts)
            flat = parts[0] if direct else source.new_empty(sum(counts))
            if len(set(counts)) == 1:  # every rank knows all the counts, so all choose alike
                code, count = moved(source)
                calls.append((lib.hfreduceAllGather, (address(source), address(flat), count, code)))
            else:
                calls.append(self._gatherv(source, flat, counts))
            if not direct:
                finishes.append(scatter_back(parts, flat))
            keep.append((parts, input, source, flat, calls[-1]))
            outputs += parts
        return self._run(name, calls, keep, outputs, opts, in_turn(finishes))

    @operation
    def gather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None, *, root: Any = None) -> Any:
        if isinstance(opts, int):
            root, opts = opts, None
        opts = options_of(dist.GatherOptions, opts, None, timeout)
        if root is not None:
            opts.rootRank = root
        root = self._root(opts.rootRank)
        input = self._checked(one(inputs, "inputs"), "input")
        source = dense(input)
        code, count = moved(source)
        if root != self._rank:
            if outputs and any(len(part) for part in outputs if not isinstance(part, torch.Tensor)):
                raise InvalidArgumentError(
                    f"outputs: rank {self._rank} is not the root ({root}) and gathers nothing; pass an empty list"
                )
            call = (lib.hfreduceGather, (address(source), ffi.NULL, count, code, root))
            return self._run("gather", [call], (input, source), [], opts)
        if not outputs:
            raise InvalidArgumentError(f"outputs: the root (rank {root}) needs a list of {self._size} tensors")
        if isinstance(outputs[0], torch.Tensor):
            outputs = [outputs]
        parts = self._checked_all(one_list(outputs, "outputs"), "outputs", input.dtype)
        self._count(len(parts), self._size, "outputs", "as a list (its tensors counted),")
        for i, part in enumerate(parts):
            self._count(part.numel(), input.numel(), f"outputs[{i}]", "as the input")
        direct = adjacent(parts)
        flat = parts[0] if direct else source.new_empty(self._size * source.numel())
        call = (lib.hfreduceGather, (address(source), address(flat), count, code, root))
        return self._run(
            "gather", [call], (parts, input, source, flat), parts, opts, None if direct else scatter_back(parts, flat)
        )

    @operation
    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None, *, root: Any = None) -> Any:
        if isinstance(opts, int):
            root, opts = opts, None
        opts = options_of(dist.ScatterOptions, opts, None, timeout)
        if root is not None:
            opts.rootRank = root
        root = self._root(opts.rootRank)
        output = self._checked(one(outputs, "outputs"), "output")
        target = output if is_dense(output) else torch.empty_like(output, memory_format=torch.contiguous_format)
        code, count = moved(target)
        finish = None if target is output else functools.partial(output.copy_, target)
        source = ffi.NULL
        flat: Any = None
        if root == self._rank:
            if not inputs:
                raise InvalidArgumentError(f"inputs: the root (rank {root}) needs a list of {self._size} tensors")
            if isinstance(inputs[0], torch.Tensor):
                inputs = [inputs]
            parts = self._checked_all(one_list(inputs, "inputs"), "inputs", output.dtype)
            self._count(len(parts), self._size, "inputs", "as a list (its tensors counted),")
            for i, part in enumerate(parts):
                self._count(part.numel(), output.numel(), f"inputs[{i}]", "as the output")
            flat = flattened(parts)
            source = address(flat)
        elif inputs and any(len(part) for part in inputs if not isinstance(part, torch.Tensor)):
            raise InvalidArgumentError(
                f"inputs: rank {self._rank} is not the root ({root}) and scatters nothing; pass an empty list"
            )
        call = (lib.hfreduceScatter, (source, address(target), count, code, root))
        return self._run("scatter", [call], (output, target, flat), [output], opts, finish)

    @operation
    def alltoall_base(
        self, output: Any, input: Any, output_splits: Any = None, input_splits: Any = None, opts: Any = None, timeout: Any = None
    ) -> Any:
        opts = options_of(dist.AllToAllOptions, opts, None, timeout)
        self._checked(output, "output")
        self._checked(input, "input")
        if output.dtype != input.dtype:
            raise InvalidArgumentError(f"output: dtype {output.dtype} differs from the input's {input.dtype}")
        send = self._splits_of(input, input_splits, "input")
        recv = self._splits_of(output, output_splits, "output")
        source = dense(input)
        target = output if is_dense(output) else torch.empty_like(output, memory_format=torch.contiguous_format)
        if source.numel() and source.data_ptr() == target.data_ptr():
            source = source.clone()
        finish = None if target is output else functools.partial(output.copy_, target)
        return self._run(
            "all_to_all_single",
            [self._alltoallv(source, send, target, recv)],
            (output, input, source, target),
            [output],
            opts,
            finish,
        )

    def _splits_of(self, tensor: Any, splits: Any, name: str) -> list[int]:
        """Elements for or from each rank; torch gives rows, or nothing for equal parts."""
        rows = tensor.shape[0] if tensor.dim() else 1
        if not splits:
            if rows % self._size:
                raise InvalidArgumentError(
                    f"{name}: its first dimension, {rows}, is not divisible by the number of ranks, {self._size}; give {name}_split_sizes"
                )
            return [tensor.numel() // self._size] * self._size
        if len(splits) != self._size:
            raise InvalidArgumentError(f"{name}_split_sizes: has {len(splits)} entries; the group has {self._size} ranks")
        if any(split < 0 for split in splits) or sum(splits) != rows:
            raise InvalidArgumentError(
                f"{name}_split_sizes: {list(splits)} must sum to the first dimension of the {name}, {rows}"
            )
        row = tensor.numel() // rows if rows else 0
        return [split * row for split in splits]

    def _alltoallv(self, source: Any, send: Sequence[int], target: Any, recv: Sequence[int]) -> Call:
        code, parts = move_code(target)
        send, recv = [n * parts for n in send], [n * parts for n in recv]
        return lib.hfreduceAlltoAllv, (
            address(source),
            ffi.new("size_t[]", send),
            ffi.new("size_t[]", displacements(send)),
            address(target),
            ffi.new("size_t[]", recv),
            ffi.new("size_t[]", displacements(recv)),
            code,
        )

    @operation
    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> Any:
        opts = options_of(dist.AllToAllOptions, opts, None, timeout)
        self._count(len(outputs), self._size, "outputs", "as a list (its tensors counted),")
        self._count(len(inputs), self._size, "inputs", "as a list (its tensors counted),")
        parts = self._checked_all(inputs, "inputs")
        targets = self._checked_all(outputs, "outputs", parts[0].dtype)
        source = flattened(parts)
        direct = adjacent(targets) and targets[0].data_ptr() != source.data_ptr()
        flat = targets[0] if direct else source.new_empty(sum(target.numel() for target in targets))
        call = self._alltoallv(source, [part.numel() for part in parts], flat, [target.numel() for target in targets])
        finish = None if direct else scatter_back(targets, flat)
        return self._run("all_to_all", [call], (parts, targets, source, flat), targets, opts, finish)
