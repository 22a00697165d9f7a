"""Kernels of `error_ratio`: reference.py, cpu.py, gpu.py."""
