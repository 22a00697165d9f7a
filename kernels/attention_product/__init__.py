"""The attention's product with values per head."""
