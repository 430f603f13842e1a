"""Long jobs in stages that an interrupt does not lose: one-shot, from a dense model to a packed one."""
