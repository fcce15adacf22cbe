"""Benchmarks of time and memory, compared with other implementations of the same work."""
