"""DistributedDataParallel: a module whose gradients are averaged at the end of every backward pass."""

# Without torch its classes are of unknown type; with it some of its functions are untyped.
# mypy: disallow-subclassing-any=False, disallow-untyped-calls=False

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from hfreduce.bucketing import BUCKET_BYTES, require_same
from hfreduce.communicator import Communicator
from hfreduce.errors import InvalidUsageError
from hfreduce.torch.reducer import GradientReducer

_PREFIX = "module."


class DistributedDataParallel(torch.nn.Module):
    """Trains a module data-parallel: as torch.nn.parallel.DistributedDataParallel, on a `GradientReducer`.

        model = hfreduce.torch.DistributedDataParallel(model)
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()     # on return, the gradients are the mean over all ranks
            optimizer.step()

    At the start all parameters and buffers become rank 0's. broadcast_buffers: the buffers (running means, say) become rank
    0's again before each forward pass that trains. The gradients are reduced while backward makes them, and backward returns
    when all are there; which of them there are may differ by step and rank, without an option. Passes by torch.autograd.grad
    are to be made inside `no_sync`, as it cannot be told that they make no gradients. For the other arguments, for
    gradients that are None, and for errors see `GradientReducer`, which is the attribute `reducer`.

    The module is the attribute `module`, and the names in state_dict() begin with "module.", as with torch's class, so that
    either loads the other's checkpoints; load_state_dict takes names without it, too (those of the bare module).
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        broadcast_buffers: bool = True,
        op: str = "avg",
        group: Any = None,
        comm: Communicator | None = None,
        compress: str | None = None,
        error_feedback: bool = False,
    ) -> None:
        """Make all ranks' parameters and buffers rank 0's. Collective."""
        super().__init__()
        self.module = module
        self.broadcast_buffers = broadcast_buffers
        self.reducer = GradientReducer(module, bucket_bytes, op, group, comm, compress=compress, error_feedback=error_feedback)
        self.reducer._on_begin = self._at_the_end
        state = [*module.named_parameters(), *module.named_buffers()]
        lines = [f"{name} {tuple(each.shape)} {each.dtype}" for name, each in state]
        try:
            require_same(self.reducer.comm, lines, "parameters and buffers")  # the reducer's are some of them
            broadcast(self.reducer.comm, [each for _, each in state])
        except BaseException:
            self.reducer.close()
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        syncing = torch.is_grad_enabled() and self.reducer._syncing
        if syncing:
            self._begin()
        output = self.module(*args, **kwargs)
        if syncing:
            # The outermost backward pass comes by here first. Hooks of parameters may run in inner ones (checkpointing),
            # whose end is not the end.
            for each in tree_iter(output):
                if isinstance(each, torch.Tensor) and each.requires_grad and not each.is_leaf:
                    each.register_hook(self._begins)
        return output

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Accumulate: backward passes inside reduce nothing; the first one outside reduces the sum of all."""
        return self.reducer.no_sync()

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any module; the names may also lack the "module." before them."""
        if not any(name in state_dict for name in self.state_dict()):
            state_dict = {_PREFIX + name: value for name, value in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def close(self) -> None:
        """Remove the hooks and leave; the module stays as it is. Closing twice is legal."""
        self.reducer.close()

    def _begin(self) -> None:
        if self.reducer.active or self.reducer._queued:
            raise InvalidUsageError(
                "the backward pass before did not come to its end (an exception?): call reducer.synchronize() to complete it "
                "with zeros for what is missing, as the other ranks wait for it, or close()"
            )
        if self.broadcast_buffers and self.training:
            broadcast(self.reducer.comm, list(self.module.buffers()))

    def _begins(self, _: Any) -> None:
        if self.reducer._syncing:
            self._at_the_end()

    def _at_the_end(self) -> None:
        if not self.reducer._queued:
            self.reducer._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.reducer.synchronize)

    def __getstate__(self) -> Any:
        raise TypeError("DistributedDataParallel cannot be pickled or copied: its ranks are this process' own; take .module")


#: Tensors of fewer bytes are broadcast together, by way of a copy.
_SMALL = 64 << 10


def broadcast(comm: Communicator, tensors: list[Any], root: int = 0) -> None:
    """Make the tensors of all ranks root's. They are of the same sizes, dtypes and kinds of device on all ranks. Collective."""
    small: dict[Any, list[Any]] = {}
    with torch.no_grad():
        for tensor in map(torch.Tensor.detach, tensors):
            if tensor.numel() * tensor.element_size() < _SMALL:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
                continue
            whole = tensor.contiguous()
            comm.broadcast(whole.view(-1).view(torch.uint8), root=root)
            if comm.rank != root and whole is not tensor:
                tensor.copy_(whole)
        for group in small.values():
            packed = torch.cat([tensor.reshape(-1) for tensor in group])
            comm.broadcast(packed.view(torch.uint8), root=root)
            if comm.rank != root:
                parts = packed.split([tensor.numel() for tensor in group])
                torch._foreach_copy_(group, [part.view(tensor.shape) for part, tensor in zip(parts, group)])
