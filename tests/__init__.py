"""The tests of lightning_reg, and its benchmarks."""
