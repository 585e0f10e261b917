"""The measuring harness behind `hfreduce perf` and benchmarks/.

patterns: values, and what must come out. collectives: the table of what is measured. measure: the loop. report: nccl-tests'
table, JSON, plot.
"""
