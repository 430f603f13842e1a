"""One benchmark an op, `bench_<op>`: checks the result, then times it beside what a user would pick instead."""
