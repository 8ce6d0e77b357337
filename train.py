"""``python train.py …``: fine-tune a causal LM on a coreset, the same as ``trim-train …``."""

import sys

if __name__ == "__main__":
    from trim_lightning.cli.hydra_app import train_main

    sys.exit(train_main())
