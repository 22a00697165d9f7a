"""The CPU engine: a small language of vectors, compiled by LLVM, and what kernels share."""
