"""Kernels of `stage_update`: reference.py, cpu.py, gpu.py."""
