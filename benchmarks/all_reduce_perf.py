#!/usr/bin/env python3
"""Measure one collective under any launcher, or alone: `mpirun -np 4 python benchmarks/all_reduce_perf.py -b 8 -e 64M -f 2`.

The collective is in the file's name; the siblings are links to this file. The same as `hfreduce perf all_reduce`.
"""

import sys

from hfreduce.cli.perf import script

if __name__ == "__main__":
    sys.exit(script(__file__))
