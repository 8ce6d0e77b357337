"""A tiny model, data for it, and real runs on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composing import compose_select, compose_train
from tiny_models import build_tiny_model, write_records
from trim_lightning.pipeline.select import select
from trim_lightning.pipeline.train import train

LETTERS = "ABC"
Change = Callable[[dict[str, Any]], None]


class MadeRuns:
    """A tiny model, a pool, targets and held-out records, and runs on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        build_tiny_model("llama", root / "model")
        write_records(root / "pool.jsonl", 40, seed=1)
        write_records(root / "targets.jsonl", 4, seed=2, edge_cases=False)
        self.held_out("held_out.jsonl", 14, seed=5)

    def held_out(self, name: str, number: int, seed: int) -> Path:
        """Records with options, so that every metric applies."""
        records = write_records(self.root / name, number, seed=seed, edge_cases=False, response_words=(2, 6))
        for place, record in enumerate(records):
            letter = LETTERS[place % 3]
            record.update(response=f"The answer is ({letter}).", answer=letter, choices=["eggs", "boxes", "coins"])
        path = self.root / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def _common(self, directory: Path, overrides: tuple[str, ...]) -> list[str]:
        root = self.root
        return [
            "model=hf", f"model.path={root / 'model'}", "model.dtype=float32", "pool=jsonl",
            f"pool.path={root / 'pool.jsonl'}", "target=jsonl", f"target.path={root / 'targets.jsonl'}", "warmup=none",
            "saliency.num_layers=3", "logger=none", "trainer=cpu", "max_length=256", f"paths.output_dir={directory}",
            f"paths.store_dir={root / 'store'}", *overrides,
        ]  # fmt: skip

    def select(self, directory: Path, *overrides: str) -> Path:
        """Run a selection."""
        return select(compose_select(self._common(directory, overrides))).directory

    def train(self, directory: Path, *overrides: str) -> Path:
        """Run a fine-tuning that changes the model enough to tell runs apart."""
        options = (
            "train.epochs=1", "train.learning_rate=0.05", f"evaluation.path={self.root / 'held_out.jsonl'}",
            "evaluation.exact_match=always", "evaluation.max_new_tokens=4", *overrides,
        )  # fmt: skip
        return train(compose_train(self._common(directory, options))).directory


def edit(run: Path, change: Change, name: str = "manifest.json") -> Path:
    """Change a JSON file of a run in place."""
    content = json.loads((run / name).read_text())
    change(content)
    (run / name).write_text(json.dumps(content))
    return run
