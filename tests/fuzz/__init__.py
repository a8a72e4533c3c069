"""Malformed frames and requests, mutated from valid ones: see `run.py`."""
