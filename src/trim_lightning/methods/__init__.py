"""One selector a module, all behind the interface in `base`."""
