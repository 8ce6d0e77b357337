"""Tasks of lm-eval on the trainee."""
