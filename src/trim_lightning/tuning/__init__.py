"""The training that warm-up and fine-tuning share."""
