"""A finished run, found and read back."""
