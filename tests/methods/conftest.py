"""One folder of files for all baselines: a tiny model, a pool with hard cases, grouped targets, one store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.reference import Reference, Settings, Tokens
from running import selection
from tiny_models import CHATML, build_tiny_model, write_records
from trim_lightning.pipeline.select import Selection

MAX_LENGTH = 96
GROUPS = ("first", "second")


@dataclass
class MethodRuns:
    """Files, the plain reference for tokens and hidden states, and a way to run a selection."""

    root: Path
    pool: list[dict[str, str]]
    targets: list[dict[str, str]]
    _references: dict[str | None, Reference] = field(default_factory=dict)
    _runs: int = 0

    def reference(self, template: str | None = CHATML) -> Reference:
        """The reference over the tiny model with (or without) a chat template; the model is made once."""
        if template not in self._references:
            folder = build_tiny_model("llama", self.model(template), seed=3, chat_template=template)
            self._references[template] = Reference(folder)
        return self._references[template]

    def model(self, template: str | None = CHATML) -> Path:
        return self.root / ("plain" if template is None else "chat")

    def tokens(self, records: Sequence[dict[str, str]], template: str | None = CHATML) -> list[Tokens]:
        return [self.reference(template).tokens(record, Settings(max_length=MAX_LENGTH)) for record in records]

    def scoped(self, scope: str = "all") -> np.ndarray:
        """Scoped tokens of every pool record, by the reference."""
        kinds = ("prompt", "response") if scope == "all" else (scope,)
        return np.array([sum(kind in kinds for kind in tokens.kinds) for tokens in self.tokens(self.pool)])

    def run(self, *overrides: str, template: str | None = CHATML, store: Path | None = None) -> Selection:
        """Run a selection on the method_runs's files; later overrides win."""
        self.reference(template)
        self._runs += 1
        return selection(
            "model=hf", f"model.path={self.model(template)}", "model.dtype=float32", f"max_length={MAX_LENGTH}",
            "pool=jsonl", f"pool.path={self.root}/pool.jsonl", "target=jsonl", f"target.path={self.root}/targets.jsonl",
            "target.num_examples=null", "trainer=cpu", "logger=none", *overrides,
            output_dir=self.root / f"run_{self._runs}", store_dir=store or self.root / "store",
        )  # fmt: skip


@pytest.fixture(scope="session")
def method_runs(tmp_path_factory: pytest.TempPathFactory) -> MethodRuns:
    root = tmp_path_factory.mktemp("method_runs")
    pool = write_records(root / "pool.jsonl", 43, seed=1)
    targets = write_records(
        root / "targets.jsonl", 4, seed=2, topics=("arithmetic", "cooking"), edge_cases=False, groups=GROUPS
    )
    return MethodRuns(root, pool, targets)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to load a language model fails."""

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a language model is loaded")

    monkeypatch.setattr("trim_lightning.models.load.load_model", refuse)


@pytest.fixture(scope="session")
def best_first() -> Callable[[np.ndarray], list[int]]:
    """Rows of the scores that are not NaN, best first, ties by row: in plain Python."""

    def order(scores: np.ndarray) -> list[int]:
        return sorted((row for row in range(len(scores)) if scores[row] == scores[row]), key=lambda row: -scores[row])

    return order
