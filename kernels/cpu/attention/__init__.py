"""What the two attention operators share on the CPU."""
