"""lm-eval's results as ours: metrics, what they depend on, and each example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trim_lightning.evaluation.harness.tasks import _Loaded


@dataclass(frozen=True)
class TaskResults:
    """What `run_tasks` found.

    Attributes:
        metrics: ``<task>/<metric>`` to score, for the tasks and groups that were asked for. A metric computed behind
            one of several answer filters is called ``<metric>_<filter>``.
        details: For each task, group and member of a group how its scores came about, JSON-able: ``scores``,
            ``stderr``, ``higher_is_better``, ``shots``, ``task_version``, ``lm_eval`` (its version); for a task also
            ``template`` (hash of the chat template, and the task's own), ``stop``, ``max_gen_toks``, ``examples``,
            ``examples_available``, ``first_prompt``, and ``by_group`` (scores of each subtask or language of a local
            task); for a group its ``members``.
        samples: For each task one dict per example: ``id``, ``output``, ``target`` and its metrics.
        warnings: What the reader of a score should know, e.g. that prompts were cut.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def _collect(results: Any, loaded: _Loaded, template: str | None, end: str, notes: list[str]) -> TaskResults:
    found = TaskResults(warnings=tuple(notes))
    for name in results["results"]:
        found.details[name] = _scores(results, name)
        if name in loaded.tasks:
            examples = results["samples"][name]
            found.details[name] |= _provenance(loaded.tasks[name], examples, template, end)
            found.details[name]["examples"] = results["n-samples"][name]["effective"]
            found.details[name]["examples_available"] = results["n-samples"][name]["original"]
            found.samples[name] = _samples(examples)
        else:
            found.details[name]["members"] = list(results["group_subtasks"].get(name, []))
    for name in loaded.reported:
        for member in _with_scores(name, found.details):
            for metric, score in found.details[member]["scores"].items():
                found.metrics[f"{member}/{metric}"] = score
    return found


def _with_scores(name: str, details: dict[str, dict[str, Any]]) -> list[str]:
    """The task or group itself, or what is in the group if lm-eval computes no score for it."""
    if details[name]["scores"]:
        return [name]
    members = details[name].get("members", [])
    return [found for member in members for found in _with_scores(member, details)]


def _scores(results: Any, name: str) -> dict[str, Any]:
    from lm_eval import __version__

    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in results["results"][name].items():
        metric, comma, answer_filter = key.partition(",")
        if not comma or isinstance(value, str):  # names and counts; "N/A" for an error that cannot be estimated
            continue
        if metric.endswith("_stderr"):
            errors[_metric_name(metric.removesuffix("_stderr"), answer_filter)] = float(value)
        else:
            scores[_metric_name(metric, answer_filter)] = float(value)
    return {
        "scores": scores,
        "stderr": errors,
        "higher_is_better": dict(results["higher_is_better"].get(name, {})),
        "shots": results["n-shot"].get(name),
        "task_version": results["versions"].get(name),
        "lm_eval": __version__,
    }


def _metric_name(metric: str, answer_filter: str) -> str:
    return metric if answer_filter == "none" else f"{metric}_{answer_filter.replace('-', '_')}"


def _provenance(task: Any, examples: Sequence[Any], template: str | None, end: str) -> dict[str, Any]:
    first = examples[0]["arguments"][0]
    options = first[1] if len(first) > 1 and isinstance(first[1], dict) else None
    details: dict[str, Any] = {
        "template": {
            "chat_template_sha256": template,
            **{part: _text_of(task.get_config(part)) for part in ("doc_to_text", "doc_to_target", "doc_to_choice")},
        },
        "stop": [*options.get("until", []), end] if options is not None else [],
        "max_gen_toks": options.get("max_gen_toks") if options is not None else None,
        "first_prompt": first[0] if isinstance(first[0], str) else None,
    }
    if getattr(task, "group_field", None):
        details["by_group"] = _by_group(task, examples)
    return details


def _text_of(value: Any) -> Any:
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else value


def _measures(example: Any) -> dict[str, Any]:
    return {_metric_name(metric, example["filter"]): example[metric] for metric in example["metrics"]}


def _by_group(task: Any, examples: Iterable[Any]) -> dict[str, dict[str, float]]:
    """Mean of each metric over each group's examples, and their number."""
    values: dict[str, dict[str, list[float]]] = {}
    for example in examples:
        group = values.setdefault(task.group_of(example["doc"]), {})
        for metric, value in _measures(example).items():
            group.setdefault(metric, []).append(float(value))
    return {
        group: {metric: sum(found) / len(found) for metric, found in metrics.items()}
        | {"examples": max(len(found) for found in metrics.values())}
        for group, metrics in sorted(values.items())
    }


def _samples(examples: Iterable[Any]) -> list[dict[str, Any]]:
    """One dict per document; lm-eval gives one per document and answer filter."""
    merged: dict[int, dict[str, Any]] = {}
    for example in examples:
        document = example["doc"]
        identity = document.get("id", example["doc_id"]) if isinstance(document, dict) else example["doc_id"]
        answers = [given[0] for given in example["resps"]]
        output = answers[0] if len(answers) == 1 else [answer[0] for answer in answers]
        line = merged.setdefault(
            example["doc_id"], {"id": identity, "output": output, "target": _plain(example["target"])}
        )
        line |= {name: _plain(value) for name, value in _measures(example).items()}
    return list(merged.values())


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which JSON takes."""
    return value.item() if hasattr(value, "item") else value
