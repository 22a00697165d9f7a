"""A run of training: its options, its loop, its folder and what it writes."""
