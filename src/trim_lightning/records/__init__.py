"""Records: where they come from, how they are read, which of them count."""
