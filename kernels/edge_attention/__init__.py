"""Kernels of `edge_attention`: reference.py, cpu.py, gpu.py."""
