"""Look at every class that transformers calls causal, and write what came of it: ``python -m census.page FILE``."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from census.verify import TOLERANCE, Verdict, verify
from trim_lightning.models.attention import OWN
from trim_lightning.models.reading import HOOK, WEIGHTS

PUBLISHED_ONLY = ("mistral3", "qwen3_vl")  # for images and texts: no causal classes, but tuned as such
HEAD = """# Compatibility: every causal class of transformers

This page is written by `make compatibility`. It builds each class tiny and random, saves it, loads it as `trim-select`
does, and compares with the class's own eager attention in float64, record by record: signals, hidden states,
fingerprints, scores, LoRA gradients, and gradients of single records. Ours run in padded batches, so that the
comparison covers padding too. Nothing here is real weights; how attention is read is told in
[models.md](models.md#how-attention-is-read). A newer transformers needs only the command again.

- **attention**: `plain` is SDPA under our hook; `own` the class's eager function, where there is more to attention than
  a softmax; `weights` what the class gives out, one target at a time. In brackets, of the class's layers, those that
  have softmax attention, if not all have.
- **select**: `uniform` works with `saliency=uniform` alone, and says why; `no` is refused with these words, before a
  record is read.
- **train**: warm-up and `trim-train` with `lora_targets=auto`, and the modules that get LoRA; **LESS**: gradients of
  single records (LESS, TAGCOS).

"""


def take() -> list[Verdict]:
    """The verdict on every class, in the order of their names."""
    found = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        for model_type in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *PUBLISHED_ONLY}):
            found.append(verify(model_type, Path(folder)))
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of transformers' own on the terminal."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers_logging.set_verbosity(before)


def page(verdicts: list[Verdict]) -> str:
    """The page as Markdown."""
    causal = [verdict for verdict in verdicts if verdict.model_type not in PUBLISHED_ONLY]
    count = {
        word: sum(1 for verdict in causal if select(verdict).startswith(word)) for word in ("yes", "uniform", "no")
    }
    told = (
        f"Of transformers {transformers.__version__}'s {len(causal)} causal model types {count['yes']} select by their "
        f"attention, {count['uniform']} with `saliency=uniform` alone, {count['no']} not at all. No number differed by "
        f"more than {TOLERANCE:.0e} (Dory's, in whose loops rounding grows: {10 * TOLERANCE:.0e}).\n\n"
    )
    lines = ["| model type | class | attention | select | train | LESS |", "| --- | --- | --- | --- | --- | --- |"]
    for verdict in verdicts:
        cells = [f"`{verdict.model_type}`", verdict.name or "", attention(verdict), select(verdict), *training(verdict)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return HEAD + told + "\n".join(lines) + "\n"


def attention(verdict: Verdict) -> str:
    """How its attention is read."""
    reading = verdict.reading
    if reading is None or not reading.layers:
        return ""
    way = {HOOK: "own" if verdict.attention == OWN else "plain", WEIGHTS: "weights"}[reading.way]
    partial = len(reading.layers) < reading.total
    return f"{way} ({len(reading.layers)} of {reading.total})" if partial else way


def select(verdict: Verdict) -> str:
    """Whether it selects, or why not."""
    if verdict.unbuilt:
        return f"no: not built ({verdict.unbuilt})"
    if verdict.refused:
        return f"no: {verdict.refused}"
    if verdict.wrong:
        return "no: WRONG"
    assert verdict.reading is not None
    return "yes" if verdict.selects else f"uniform: {verdict.reading.why.partition(' has ')[2]}"


def training(verdict: Verdict) -> tuple[str, str]:
    """What LoRA trains, and whether records have gradients of their own."""
    if verdict.unbuilt or verdict.refused:
        return "", ""
    trains = f"yes: {verdict.lora}" if verdict.trained else f"no: {verdict.lora.partition(': ')[2]}"
    return trains, "yes" if verdict.trained and not verdict.less else f"no: {verdict.less.partition(': ')[2]}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(take()), encoding="utf-8")
