"""The methods of the solvers, one idea a file."""
