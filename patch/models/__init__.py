"""Models of transformers seen from outside: which layers may be masked, their keep masks, modes and facts."""
