"""Names of the files in a run's directory."""

from __future__ import annotations

FILES = (
    "scores.parquet", "coreset.jsonl", "token_scores.parquet", "target_tokens.parquet", "fingerprints.safetensors",
    "manifest.json", "report.html",
)  # fmt: skip
