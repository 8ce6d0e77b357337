"""A selection and a training run from beginning to end."""
