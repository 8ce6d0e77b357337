"""Every configuration key, its checks, and the way from Hydra to plain objects."""
