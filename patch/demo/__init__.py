"""`patch-llm demo`: the main job on a small model, in a few minutes on a CPU."""
