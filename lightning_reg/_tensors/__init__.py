"""Helpers for lists of tensors: shards, gradients, reductions, output units, chunks that fit a cache, and random numbers."""
