"""The stages between which results are stored: models, passes, fingerprints, scores, checkpoints."""
