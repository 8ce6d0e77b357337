"""What the jobs of a sweep share, run once."""
