"""How gradients of a solve are found: checkpoints, a limit of memory, the continuous adjoint."""
