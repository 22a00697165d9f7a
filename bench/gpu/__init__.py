"""The suite `gpu`: every claim about the GPU kernels, measured on a machine that has a GPU."""
