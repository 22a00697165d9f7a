"""Kernels of `csr_diffusion`: reference.py, cpu.py, gpu.py."""
