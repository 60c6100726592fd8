"""Measures, each a module that prints one JSON line last. Run one by ``python -m benchmarks NAME``."""
