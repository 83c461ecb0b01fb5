"""Benchmarks: each writes its own section of RESULTS.md."""
