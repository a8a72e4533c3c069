"""Micro benchmarks of parts, run by hand: python -m tests.bench.NAME."""
