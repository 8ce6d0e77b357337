"""The method of the paper and nothing else: saliency, fingerprints, matching, pooling.

These modules take and return tensors or arrays and know nothing of Lightning, Hydra, files or tokenizers.
The paper's body was not available to us; where its summary is silent, docstrings say "our choice".
"""
