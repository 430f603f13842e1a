"""Benchmarks: `python -m benchmarks.bench_<op>`. Each prints a table and can save it as CSV."""
