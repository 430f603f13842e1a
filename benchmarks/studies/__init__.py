"""Studies over whole models: quality of every method, memory of learning."""
