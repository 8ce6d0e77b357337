"""lm-eval tasks on the trainee, through the store."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trim_lightning.settings.schema import EvaluationSettings
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import Cost, Entry, StageKey

RESULTS = "tasks.json"


@dataclass(frozen=True)
class TaskScores:
    """Scores of lm-eval tasks.

    Attributes:
        metrics: ``<task>/<metric>`` to value.
        details: Template, shots, stop strings, versions … of each task.
    """

    metrics: Mapping[str, float]
    details: dict[str, Any]


def task_scores(trainee: Trainee, tuned: Entry | None, settings: EvaluationSettings, seed: int) -> TaskScores:
    """Run the configured tasks on the trainee, fine-tuned or not, or find the scores in the store.

    Raises:
        UserError: for an unknown task, or data that cannot be had.
    """
    from trim_lightning.evaluation.harness.run import data_digest, run_tasks

    key = StageKey(
        "tasks",
        1,
        {
            "tasks": settings.tasks,
            "num_fewshot": settings.num_fewshot,
            "limit": settings.task_limit,
            "seed": seed,
            "chat_template": trainee.source.chat_template,
            "data": data_digest(settings.tasks, settings.data_dir, settings.tasks_path),
        },
        {
            "trainee": {"model": trainee.source.digest, "dtype": str(trainee.dtype)},
            "tuned": None if tuned is None else tuned.key.hex,
        },
    )

    def build(directory: Path) -> dict[str, Any]:
        model = trainee.model(tuned)
        started = time.perf_counter()
        results = run_tasks(
            model,
            trainee.tokenizer,
            settings.tasks,
            tasks_path=settings.tasks_path,
            data_dir=settings.data_dir,
            num_fewshot=settings.num_fewshot,
            limit=settings.task_limit,
            chat_template=trainee.source.chat_template,
            seed=seed,
        )
        for warning in results.warnings:
            trainee.ledger.warn(warning)
        content = {"metrics": results.metrics, "details": results.details}
        (directory / RESULTS).write_text(json.dumps(content, default=str), encoding="utf-8")
        return {"seconds": time.perf_counter() - started}

    booked = "tasks_before" if tuned is None else "tasks_after"
    entry = trainee.store.get(key, build, cost=Cost(booked, lambda: 0))
    trainee.ledger.book(booked, entry)
    content = json.loads((entry.path / RESULTS).read_text(encoding="utf-8"))
    return TaskScores(content["metrics"], content["details"])
