"""Timings and memory of compressed training beside stock training, for ``tools/benchmark.py``."""
