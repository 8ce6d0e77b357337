"""What a person reads on a terminal: amounts, progress, invisible characters made visible."""
