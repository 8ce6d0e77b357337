"""Finding and loading models, their number format, LoRA, attention and losses."""
