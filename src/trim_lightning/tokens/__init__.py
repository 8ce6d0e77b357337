"""Chat rendering, roles of tokens, tokenised records on disk."""
