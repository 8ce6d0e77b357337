"""Names of the files in a run's directory."""

from __future__ import annotations

from trim_lightning.stages.scoring import BANKS, TARGETS, TOKEN_SCORES

CORESET, SCORES, MANIFEST, REPORT = "coreset.jsonl", "scores.parquet", "manifest.json", "report.html"
BAD_RECORDS = "bad_records.jsonl"
METRICS, PREDICTIONS = "metrics.json", "predictions.jsonl"  # of a training run
SELECTION = "selection"  # the folder of a training run with the files of the selection that it made
FILES = {
    CORESET: "the picked records, best first, as they were in the input",
    SCORES: "score and rank of every pool record",
    MANIFEST: "config, versions, inputs, stages, counts, warnings",
    TARGETS: "saliency of every target token",
    BANKS: "the fingerprint bank",
    TOKEN_SCORES: "similarity of every pool token",
    BAD_RECORDS: "records that cannot be read and were left out",
    REPORT: "",
}
"""What a selection writes, and what a reader is told of it."""
