"""Benchmarks of the kernels, and the shapes that they share with the tests."""
