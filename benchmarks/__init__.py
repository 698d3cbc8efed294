"""Benchmarks of speed and memory against plain implementations, measured in the same run."""
