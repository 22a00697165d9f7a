"""The suite `solvers`: time and memory to a given error, per step, and of a whole solve."""
