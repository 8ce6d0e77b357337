"""What is measured before and after fine-tuning: held-out loss, exact match, option accuracy, lm-eval tasks."""
