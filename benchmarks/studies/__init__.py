"""Studies over whole models: quality of every method, memory of learning, generation on a CPU."""
