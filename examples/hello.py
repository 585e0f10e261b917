#!/usr/bin/env python3
"""The sum of an array over all ranks: `hfreduce run -n 4 hello.py`, or under mpirun, torchrun, srun; alone it is one rank."""

import numpy as np

import hfreduce

with hfreduce.init() as comm:
    gradient = np.full(1000, comm.rank + 1, dtype=np.float32)
    comm.all_reduce(gradient)  # in place
    print(f"rank {comm.rank} of {comm.nranks} on node {comm.node} of {comm.nodes}: the sum is {gradient[0]:g}", flush=True)
