"""Reading and writing single files: JSON within bounds, whole files or none."""
