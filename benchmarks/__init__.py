"""Benchmarks, run from a checkout: `python -m benchmarks.ops.bench_NAME` prints a table and can save it as CSV."""
