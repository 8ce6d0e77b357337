"""The bridge to lm-eval (EleutherAI's language model evaluation harness): its tasks on a model in memory.

lm-eval builds the prompts, runs the model and computes the metrics. This module finds the tasks, ours over local
files among them (``tasks/``), renders prompts as training does, turns lm-eval's errors into one line each, keeps it
quiet, and records with every score how it came about.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_lightning.errors import UserError
from trim_lightning.evaluation.harness.tasks import (
    LOCAL_TASKS,
    TASKS_FOLDER,
    _check_installed,
    _check_task_files,
    _fit,
    _fit_shots,
    _listed,
    _load,
    _Loaded,
    _one_line,
    _quiet,
    _task_manager,
    local_folder,
)
from trim_lightning.files.atomic import write_text
from trim_lightning.records.record_file import sha256_of
from trim_lightning.settings.schema import EvaluationSettings
from trim_lightning.stages.trainee import Evaluated, Trainee
from trim_lightning.store import Cost, Entry, StageKey
from trim_lightning.store.keys import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trim_lightning.engine.devices import Resources
    from trim_lightning.models.load import ModelRecipe

RESULTS, PASSES = "tasks.json", "passes"
BATCH = 8  # sequences in one forward pass
BOOTSTRAP = 200  # resamples for the standard error of a metric that is not a mean


@dataclass(frozen=True)
class TaskResults:
    """Scores of tasks, and how they came about.

    Attributes:
        metrics: ``<task>/<metric>`` to score, for the tasks and groups that were asked for. A metric computed behind
            one of several answer filters is called ``<metric>_<filter>``.
        details: For each task, group and member of a group how its scores came about, JSON-able: ``scores``,
            ``stderr``, ``higher_is_better``, ``shots``, ``task_version``, ``lm_eval`` (its version); for a task also
            ``template`` (hash of the chat template, and the task's own), ``stop``, ``max_gen_toks``, ``examples``,
            ``examples_available``, ``first_prompt``, and ``by_group`` (scores of each subtask or language of a local
            task); for a group its ``members``.
        warnings: What the reader of a score should know, e.g. that prompts were cut.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def task_scores(trainee: Trainee, tuned: Entry | None, settings: EvaluationSettings, seed: int) -> TaskResults:
    """Run the configured tasks on the trainee, fine-tuned or not, or find the scores in the store.

    Raises:
        UserError: for an unknown task, or data that cannot be had.
    """
    from trim_lightning.tokens.rendering import DATE

    key = StageKey(
        "tasks",
        3,
        {
            "tasks": settings.tasks,
            "num_fewshot": settings.num_fewshot,
            "limit": settings.task_limit,
            "seed": seed,
            "chat_template": trainee.source.chat_template,
            "date": DATE,
            "data": data_digest(settings),
        },
        {
            "trainee": trainee.identity,
            "tuned": None if tuned is None else tuned.key.hex,
        },
    )

    resources = trainee.resources()

    def build(directory: Path) -> dict[str, Any]:
        from trim_lightning.engine.devices import model_for
        from trim_lightning.models.load import ModelRecipe, empty_model

        model, template, passes = model_for(resources, Evaluated(trainee, tuned)), trainee.source.chat_template, None
        if isinstance(model, ModelRecipe):
            passes = Spread(model, resources, directory / PASSES)
            model = empty_model(trainee.source)
        started = time.perf_counter()
        results = run_tasks(model, trainee.tokenizer, settings, seed, template, passes)
        if resources.processes.leads:
            content = {"metrics": results.metrics, "details": results.details, "warnings": results.warnings}
            write_text(json.dumps(content, default=str), directory / RESULTS)
            shutil.rmtree(directory / PASSES, ignore_errors=True)
        return {"seconds": time.perf_counter() - started}

    booked = "tasks_before" if tuned is None else "tasks_after"
    entry = trainee.store.get(key, build, resumable=True, together=True, cost=Cost(booked, lambda: 0))
    trainee.ledger.book(booked, entry)
    content = json.loads((entry.path / RESULTS).read_text(encoding="utf-8"))
    for warning in content["warnings"]:  # from the store as well
        trainee.ledger.warn(warning)
    return TaskResults(content["metrics"], content["details"], tuple(content["warnings"]))


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    seed: int,
    chat_template: str | None = None,
    spread: Spread | None = None,
) -> TaskResults:
    """Run lm-eval tasks on a model that is already loaded, or that the processes of a pass load.

    Model, tokenizer and global random state are left as they were.

    Args:
        model: A causal LM, on the device on which to run.
        tokenizer: Its tokenizer. Its chat template renders the prompts, with the same stopped clock as in training;
            without one they are plain.
        settings: ``tasks`` (tasks, groups or tags: lm-eval's own, those in ``tasks_path``, or `LOCAL_TASKS`), and how;
            without ``data_dir`` the local tasks' files are in TRIM_DATA_DIR.
        seed: Of the choice of shots, and of sampling where a task samples.
        chat_template: Text of a template to use instead of the tokenizer's own.
        spread: What answers in place of the model, which then needs no weights.

    Returns:
        The scores; none in a process that helps another one.

    Raises:
        UserError: if lm-eval is missing, a task is unknown or broken, its data cannot be had, or it has too few
            shots.
    """
    if not settings.tasks:
        return TaskResults()
    _check_installed()
    from lightning.pytorch.utilities.seed import isolate_rng
    from lm_eval import simple_evaluate

    from trim_lightning.tokens.rendering import own_template

    template = chat_template or own_template(tokenizer)
    chat = template is not None
    with _quiet() as heard, isolate_rng(), contextlib.ExitStack() as afterwards:
        afterwards.callback(model.train, model.training)
        manager = _task_manager(settings)
        loaded = _load(manager, settings.tasks)
        harness = _wrap(model, tokenizer, template) if spread is None else spread.harness(model, tokenizer, template)
        notes = _fit(loaded, settings.num_fewshot, harness.max_length, harness.max_gen_toks)
        try:
            results = simple_evaluate(
                model=harness,
                tasks=loaded.objects,
                task_manager=manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.task_limit,
                apply_chat_template=chat,
                bootstrap_iters=BOOTSTRAP,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except ValueError as error:  # a task that needs images, or runs generated code
            raise UserError(
                f"evaluation.tasks={_listed(settings.tasks)}: lm-eval refuses ({_one_line(error)})"
            ) from error
    if results is None:
        return TaskResults()
    if spread is not None:
        heard += harness.crew.heard
    notes += [f"lm-eval: {message}" for message in sorted(set(heard))]
    template_hash = hashlib.sha256(template.encode()).hexdigest() if template is not None else None
    end = harness.tok_decode(harness.eot_token_id, skip_special_tokens=False)
    return _collect(results, loaded, template_hash, end, notes)


def check_tasks(settings: EvaluationSettings) -> None:
    """Find and load tasks without a model, so that a mistake shows before hours of training.

    Raises:
        UserError: as `run_tasks`.
    """
    if not settings.tasks:
        return
    _check_installed()
    with _quiet():
        for name, task in _load(_task_manager(settings), settings.tasks).tasks.items():
            _fit_shots(name, task, settings.num_fewshot)


def data_digest(settings: EvaluationSettings) -> str:
    """Digest of the files that the scores of tasks depend on, for cache keys.

    It covers lm-eval's version, our task files and their code, the local tasks' data, and every file in
    ``tasks_path``. What lm-eval's own tasks fetch from the Hub is outside it.

    Raises:
        UserError: if lm-eval is missing or ``tasks_path`` is no folder.
    """
    tasks, tasks_path = settings.tasks, settings.tasks_path
    if not tasks:
        return digest_of([])
    _check_installed()
    from lm_eval import __version__

    files = [path for path in (*TASKS_FOLDER.iterdir(), TASKS_FOLDER.with_name("options.py")) if path.is_file()]
    local = LOCAL_TASKS if tasks_path is not None else [name for name in tasks if name in LOCAL_TASKS]
    folder = local_folder(settings)
    for name in local:
        pair = (folder / f"{name.removeprefix('trim_')}.{split}.jsonl" for split in ("train", "test"))
        files += [path for path in pair if path.is_file()]
    if tasks_path is not None:
        _check_task_files(tasks_path)
        files += [path for path in Path(tasks_path).expanduser().rglob("*") if path.is_file() and path.suffix != ".pyc"]
    digests = sorted((path.name, sha256_of(path, str(path))) for path in files)
    return digest_of([__version__, [list(pair) for pair in digests]])


# ---------------------------------------------------------------- the model, as lm-eval wants it


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, batch_size=BATCH, **_options(tokenizer, template))


def _options(tokenizer: PreTrainedTokenizerBase, template: str | None) -> dict[str, Any]:
    from trim_lightning.tokens.rendering import DATE, with_stopped_clock

    own = copy.deepcopy(tokenizer)  # it may be given a padding token
    own.chat_template = None if template is None else with_stopped_clock(template)
    return {
        "tokenizer": own,
        "backend": "causal",
        "softmax_dtype": "float32",  # in bfloat16 the log-likelihoods of options tie
        # a rendered conversation holds its special tokens already, as in training
        "add_bos_token": None if template is None else False,
        "chat_template_args": {"date_string": DATE},
    }


@dataclass(frozen=True)
class Spread:
    """Several processes that answer what lm-eval asks.

    Attributes:
        recipe: How each of them loads the model.
        resources: What they run on.
        directory: Where their passes leave files; those of an earlier attempt are kept.
    """

    recipe: ModelRecipe
    resources: Resources
    directory: Path

    def harness(self, frame: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Any:
        """lm-eval's model; ``frame`` is the model without weights."""
        from trim_lightning.evaluation.harness.spread import Crew, SpreadHarness

        wrap = functools.partial(_wrap, tokenizer=tokenizer, template=template)
        crew = Crew(self.recipe, wrap, self.directory, self.resources)
        return SpreadHarness(frame, BATCH, crew, **_options(tokenizer, template))


# ---------------------------------------------------------------- what came out


def _collect(results: Any, loaded: _Loaded, template: str | None, end: str, notes: list[str]) -> TaskResults:
    found = TaskResults(warnings=tuple(notes))
    for name in results["results"]:
        found.details[name] = _scores(results, name)
        if name in loaded.tasks:
            examples = results["samples"][name]
            found.details[name] |= _provenance(loaded.tasks[name], examples, template, end)
            found.details[name]["examples"] = results["n-samples"][name]["effective"]
            found.details[name]["examples_available"] = results["n-samples"][name]["original"]
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
