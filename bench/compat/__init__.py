"""Somebody's program as it is, and on our kernels."""
