"""Kernels of `attention_diffusion`: reference.py, cpu.py, gpu.py."""
