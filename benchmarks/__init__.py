"""Benchmarks: how well samples follow their prompts, and speed and memory beside the alternatives."""
