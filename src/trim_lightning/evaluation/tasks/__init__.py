"""Task files for lm-eval over local JSON lines, and the code that they name."""
