"""Each measure against a plain computation of its own."""
