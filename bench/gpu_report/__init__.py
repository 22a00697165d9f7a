"""What can be known of the GPU kernels without a GPU: they compile, and what they then need."""
