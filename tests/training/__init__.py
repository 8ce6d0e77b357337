"""Fine-tuning and evaluation as train.py runs them."""
