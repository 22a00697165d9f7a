"""Kernels of `edge_softmax`: reference.py, cpu.py, gpu.py."""
