"""What torch_suite.py expects besides tests that pass: tests that cannot, and why; and torch's reasons for skipping.

Measured with torch 2.13 on a machine without GPU, 4 ranks.
"""

from __future__ import annotations

#: Test: what in torch keeps it from passing on a backend that is not its own. A test that passes must go from here.
CANNOT_PASS: dict[str, str] = dict.fromkeys(
    (
        "test_monitored_barrier_failure_order",
        "test_monitored_barrier_gloo",
        "test_monitored_barrier_gloo_subgroup",
        "test_monitored_barrier_wait_all_ranks",
    ),
    "torch.distributed.monitored_barrier raises ValueError unless the backend's name is gloo, before it calls the group; the group's "
    "own monitored_barrier works",
)

#: The same for groups on the C++ shim (python -m hfreduce.torch.shim), beside those above.
CANNOT_PASS_ON_SHIM: dict[str, str] = {
    "test_ddp_logging_data_cpu": "DDP's logger asks torch's C++ ProcessGroup for its name, which is custom for every backend that "
    "is not torch's own",
}

#: Pattern of the whole reason that torch gives for a skip: why that is not about this backend.
SKIPPED: dict[str, str] = {
    r"Need at least \d CUDA devices": "the test puts its tensors or models on GPUs",
    r"CUDA is not available\.": "the test puts its tensors on a GPU",
    r"Only (Nccl|NCCL) supports CUDA .*": "the test puts its tensors on a GPU",
    r"Only Nccl supports (all_gather_v|reduce_scatter_v)": "the test puts its tensors on a GPU",
    r"(NCCL Batch Send Recv|NCCL Send Recv) Only": "the test puts its tensors on a GPU",
    r"Coalescing manager currently tests with NCCL only; internal test flaky": "the test puts its tensors on a GPU",
    r"Only NCCL backend supports high priority stream": "CUDA streams",
    r"MPI doesn't support GPU barrier": "the test puts its tensors on a GPU",
    r"Test requires backend \w+ to be one of \{'nccl'\}": "the test puts its tensors on a GPU",
    r".*https://github.com/pytorch/pytorch/(issues|pull)/\d+": "torch has disabled the test on Linux for every backend",
    r"Skipped due to flakiness": "torch has disabled the test for every backend",
    r"no torchvision": "the test needs torchvision; with it, a GPU",
}
