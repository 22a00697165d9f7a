"""Kernels of `spmm`: reference.py, cpu.py, gpu.py."""
