"""Calls in the form of torchdiffeq."""
