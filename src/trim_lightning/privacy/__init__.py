"""What may leave this machine: keys never, paths only by name."""
