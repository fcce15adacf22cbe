"""Benchmarks of time and memory, each beside another implementation of the same work."""
