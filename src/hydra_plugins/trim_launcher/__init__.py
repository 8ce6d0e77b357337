"""A Hydra launcher that runs what the jobs of a sweep share once, before it launches them."""
