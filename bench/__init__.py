"""Benchmarks of grand-fast: `python -m bench --help`, and `pytest bench/ops`. Not installed."""
