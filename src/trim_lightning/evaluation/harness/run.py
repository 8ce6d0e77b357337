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
import logging
import os
import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_lightning.console.progress import progress_bar
from trim_lightning.errors import UserError
from trim_lightning.records.layouts import guess
from trim_lightning.records.record_file import sha256_of
from trim_lightning.store.keys import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS_FOLDER = Path(__file__).parents[1] / "tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in TASKS_FOLDER.glob("trim_*.yaml")))
BOOTSTRAP = 200  # resamples for the standard error of a metric that is not a mean
PROBE_SECONDS = 5.0
DATA_VARIABLE = "TRIM_DATA_DIR"


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


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    tasks_path: str | None = None,
    data_dir: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = True,
    chat_template: str | None = None,
    seed: int = 0,
) -> TaskResults:
    """Run lm-eval tasks on a model that is already loaded.

    Model, tokenizer and global random state are left as they were.

    Args:
        model: A causal LM, on the device on which to run.
        tokenizer: Its tokenizer. Its chat template renders the prompts, with the same fixed date as in training.
        tasks: Names of tasks, groups or tags: lm-eval's own, those in ``tasks_path``, or `LOCAL_TASKS`.
        tasks_path: Folder of further task files.
        data_dir: Folder of the local tasks' ``<task>.test.jsonl`` files; None takes TRIM_DATA_DIR.
        num_fewshot: Shots; None takes each task's own number.
        limit: The first so many examples of each task; None takes all.
        batch_size: Sequences in one forward pass.
        apply_chat_template: False gives plain prompts, as for a tokenizer without a template.
        chat_template: Text of a template to use instead of the tokenizer's own.
        seed: Of the choice of shots, and of sampling where a task samples.

    Returns:
        Scores, how they came about, and what was answered.

    Raises:
        UserError: if lm-eval is missing, a task is unknown or broken, its data cannot be had, or it has too few
            shots.
    """
    if not tasks:
        return TaskResults()
    _check_installed()
    from lightning.pytorch.utilities.seed import isolate_rng
    from lm_eval import simple_evaluate

    template = chat_template or tokenizer.chat_template
    chat = apply_chat_template and template is not None
    with _quiet() as heard, isolate_rng(), _left_as_found(model):
        manager = _task_manager(tasks, tasks_path, data_dir)
        loaded = _load(manager, tasks)
        harness = _wrap(model, tokenizer, batch_size, template if chat else None)
        notes = _fit(loaded, num_fewshot, harness.max_length, harness.max_gen_toks)
        try:
            results = simple_evaluate(
                model=harness,
                tasks=loaded.objects,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat,
                bootstrap_iters=BOOTSTRAP,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except ValueError as error:  # a task that needs images, or runs generated code
            raise UserError(f"evaluation.tasks={_listed(tasks)}: lm-eval refuses ({_one_line(error)})") from error
    assert results is not None  # it is None on further processes only, and there is one
    notes += [f"lm-eval: {message}" for message in sorted(set(heard))]
    template_hash = hashlib.sha256(str(template).encode()).hexdigest() if chat else None
    end = harness.tok_decode(harness.eot_token_id, skip_special_tokens=False)
    return _collect(results, loaded, template_hash, end, notes)


def check_tasks(
    tasks: Sequence[str],
    *,
    tasks_path: str | None = None,
    data_dir: str | None = None,
    num_fewshot: int | None = None,
) -> None:
    """Find and load tasks without a model, so that a mistake shows before hours of training.

    Raises:
        UserError: as `run_tasks`.
    """
    if not tasks:
        return
    _check_installed()
    with _quiet():
        for name, task in _load(_task_manager(tasks, tasks_path, data_dir), tasks).tasks.items():
            _fit_shots(name, task, num_fewshot)


def data_digest(tasks: Sequence[str], data_dir: str | None = None, tasks_path: str | None = None) -> str:
    """Digest of the files that the scores of tasks depend on, for cache keys.

    It covers lm-eval's version, our task files and their code, the local tasks' data, and every file in
    ``tasks_path``. What lm-eval's own tasks fetch from the Hub is outside it.

    Raises:
        UserError: if lm-eval is missing or ``tasks_path`` is no folder.
    """
    if not tasks:
        return digest_of([])
    _check_installed()
    from lm_eval import __version__

    files = [path for path in (*TASKS_FOLDER.iterdir(), TASKS_FOLDER.with_name("options.py")) if path.is_file()]
    local = LOCAL_TASKS if tasks_path is not None else [name for name in tasks if name in LOCAL_TASKS]
    folder = Path(data_dir or os.environ.get(DATA_VARIABLE) or os.devnull).expanduser()
    for name in local:
        pair = (folder / f"{name.removeprefix('trim_')}.{split}.jsonl" for split in ("train", "test"))
        files += [path for path in pair if path.is_file()]
    if tasks_path is not None:
        _check_task_files(tasks_path)
        files += [path for path in Path(tasks_path).expanduser().rglob("*") if path.is_file() and path.suffix != ".pyc"]
    digests = sorted((path.name, sha256_of(path, str(path))) for path in files)
    return digest_of([__version__, [list(pair) for pair in digests]])


def _check_installed() -> None:
    remedy = "run pip install 'trim-lightning[eval]'"
    try:
        from lm_eval import __version__
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"evaluation.tasks: needs the library lm-eval; {remedy}") from None
    if not hasattr(TaskManager, "load"):
        raise UserError(f"evaluation.tasks: lm-eval {__version__} is too old; {remedy}")


# ---------------------------------------------------------------- finding and loading tasks


@dataclass
class _Loaded:
    """What the names stand for: lm-eval's objects, and the names whose scores are reported."""

    objects: list[Any] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)
    reported: list[str] = field(default_factory=list)


def _task_manager(tasks: Sequence[str], tasks_path: str | None, data_dir: str | None) -> Any:
    """An index of tasks that knows every name."""
    folders = [str(TASKS_FOLDER)]
    stamp: tuple[tuple[str, int], ...] = ()
    if tasks_path is not None:
        stamp = _check_task_files(tasks_path)
        folders.append(str(Path(tasks_path).expanduser()))
    manager = _index(tuple(folders), stamp, data_dir, False)
    if all(name in manager.task_index for name in tasks):
        return manager
    manager = _index(tuple(folders), stamp, data_dir, True)
    for name in tasks:
        if name not in manager.task_index:
            hint = guess(name, manager.all_tasks) or ";"
            raise UserError(
                f"evaluation.tasks: no task is called {name}{hint} local ones are {', '.join(LOCAL_TASKS)}, "
                "your own go into evaluation.tasks_path"
            )
    return manager


@functools.lru_cache(maxsize=4)
def _index(folders: tuple[str, ...], stamp: tuple[Any, ...], data_dir: str | None, with_lm_evals_own: bool) -> Any:
    """lm-eval's own tasks are thousands of files, which take seconds to read: kept for the next evaluation."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=with_lm_evals_own, metadata={"data_dir": data_dir})


def _check_task_files(tasks_path: str) -> tuple[tuple[str, int], ...]:
    """Refuse files that lm-eval would skip without a word; returns the files and when they were written."""
    import yaml

    folder = Path(tasks_path).expanduser()
    if not folder.is_dir():
        raise UserError(f"evaluation.tasks_path={tasks_path}: there is no such folder")
    files = sorted(folder.rglob("*.yaml"))
    for path in files:
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"evaluation.tasks_path: {path} is not valid YAML ({_one_line(error)})") from None
    return tuple((str(path), path.stat().st_mtime_ns) for path in files)


def _load(manager: Any, tasks: Sequence[str]) -> _Loaded:
    loaded = _Loaded()
    offline = contextlib.nullcontext() if _all_local(manager, tasks) or _hub_answers() else _offline()
    with offline:
        for name in tasks:
            found = _load_one(manager, name)
            for task in found["tasks"]:
                if task in loaded.tasks:
                    raise UserError(f"evaluation.tasks={_listed(tasks)}: {task} is in there twice; name it once")
            loaded.tasks |= found["tasks"]
            if name in found.get("groups", {}):
                loaded.objects.append(found["groups"][name])
                loaded.reported.append(name)
            else:  # a task, or a tag, which stands for several
                loaded.objects += found["tasks"].values()
                loaded.reported += found["tasks"]
    return loaded


def _load_one(manager: Any, name: str) -> Any:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return manager.load([name])
    except UserError:
        raise
    except (ConnectionError, DatasetNotFoundError, HfHubHTTPError) as error:
        local = local_counterpart(name)
        remedy = (
            f"use the local task {local} with evaluation.data_dir=FOLDER"
            if local
            else "run it once with a network, after which it loads from the cache, or write a task over local files "
            "(evaluation.tasks_path)"
        )
        raise UserError(f"evaluation.tasks: the data of {name} cannot be fetched ({_one_line(error)}); {remedy}") from (
            error
        )
    except Exception as error:  # a task file is foreign code and may raise anything
        raise UserError(
            f"evaluation.tasks: {name} cannot be loaded ({type(error).__name__}: {_one_line(error)}); mend its task "
            "file or its data"
        ) from error


def local_counterpart(name: str) -> str | None:
    """The local task over the same data as one of lm-eval's, or None."""
    return next((local for local in LOCAL_TASKS if f"_{local.removeprefix('trim_')}_" in f"_{name}_"), None)


def _all_local(manager: Any, tasks: Iterable[str]) -> bool:
    return all(name in LOCAL_TASKS and manager.task_index[name].yaml_path.parent == TASKS_FOLDER for name in tasks)


def _hub_answers() -> bool:
    """Whether the Hub can be reached: one short request, where the libraries would retry for half a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # no network, offline mode, a broken proxy: whatever it is, there is no answer
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let the Hub's libraries look into their caches only."""
    import datasets.config
    from huggingface_hub import constants

    with _replaced(constants, "HF_HUB_OFFLINE", True), _replaced(datasets.config, "HF_HUB_OFFLINE", True):
        yield


def _fit(loaded: _Loaded, num_fewshot: int | None, max_length: int, default_length: int) -> list[str]:
    """Check the shots, and shorten answers that would leave no room for a prompt.

    Returns:
        A line for everything that is not as asked.
    """
    notes = []
    for name, task in loaded.tasks.items():
        notes += _fit_shots(name, task, num_fewshot)
        arguments = task.get_config("generation_kwargs") or {}
        longest = max_length // 2
        if task.get_config("output_type") == "generate_until":
            asked = int(arguments.get("max_gen_toks", default_length))
            if asked > longest:
                task.set_config(key="generation_kwargs", value={"max_gen_toks": longest}, update=True)
                notes.append(f"{name}: answers end after {longest} tokens, not {asked}: the model takes {max_length}")
    return notes


def _fit_shots(name: str, task: Any, num_fewshot: int | None) -> list[str]:
    own = task.get_config("num_fewshot")
    if own == 0 and num_fewshot:  # lm-eval keeps a zero that a task file sets
        return [f"{name}: has 0 shots by its task file, so evaluation.num_fewshot={num_fewshot} does not apply"]
    shots = num_fewshot if num_fewshot is not None else own or 0
    available = _available_shots(task)
    if available is None or shots <= available:
        return []
    grouped = getattr(task, "group_field", None)
    place = f"for every {grouped}" if grouped else "in all"
    source = f"{task.file}.train.jsonl" if hasattr(task, "file") else "its data"
    if num_fewshot is not None:
        raise UserError(
            f"evaluation.num_fewshot={num_fewshot}: {name} has {available} examples for shots {place} in {source}; "
            "lower it or add examples"
        )
    task.set_config(key="num_fewshot", value=available)
    return [f"{name}: {available} shots, not its {shots}: {source} has no more {place}"]


def _available_shots(task: Any) -> int | None:
    if hasattr(task, "available_shots"):
        return int(task.available_shots())
    sampler = getattr(task, "sampler", None)
    return len(sampler.df) if sampler is not None and sampler.df else None


# ---------------------------------------------------------------- the model, as lm-eval wants it


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, template: str | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    from trim_lightning.tokens.rendering import DATE

    own = copy.deepcopy(tokenizer)  # it may be given a padding token
    own.chat_template = template
    return HFLM(
        pretrained=model,
        tokenizer=own,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype="float32",  # in bfloat16 the log-likelihoods of options tie
        # a rendered conversation holds its special tokens already, as in training
        add_bos_token=None if template is None else False,
        chat_template_args={"date_string": DATE},
    )


@contextlib.contextmanager
def _left_as_found(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module's variable another value for a while, if it has that variable."""
    if not hasattr(module, name):
        yield
        return
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


class _Hearing(logging.Handler):
    """Keeps the warnings that change what a score means."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "truncat" in message.lower():
            # without the lengths, which differ from prompt to prompt
            self.messages.append("prompts that are longer than the model takes lost their beginning")
        elif "index was not in" in message:
            self.messages.append("a record's answer is none of its choices")


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep lm-eval's log, prints about the machine and bars off the screen; yields the warnings that matter."""
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    from transformers.utils import logging as transformers_logging

    heard = _Hearing()
    level = transformers_logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(lm_eval.models.huggingface, "tqdm", _bar))
        for module in (lm_eval.api.task, lm_eval.api.model):
            stack.enter_context(_replaced(module, "tqdm", lambda items, **_: items))
        # they start git and pip, whose answers the manifest has already
        stack.enter_context(_replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: None))
        stack.enter_context(_replaced(lm_eval.evaluator, "add_env_info", lambda results: None))
        stack.enter_context(_replaced(lm_eval.api.metrics, "bootstrap_stderr", _bootstrap_error))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_logger_to("lm_eval", heard))
        for name in ("httpx", "httpx2", "huggingface_hub", "datasets", "evaluate", "fsspec"):
            stack.enter_context(_logger_to(name, None))
        transformers_logging.set_verbosity_error()
        datasets.disable_progress_bars()
        try:
            yield heard.messages
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                datasets.enable_progress_bars()


def _bar(items: Any = None, *, total: int | None = None, desc: str | None = None, **_: Any) -> Any:
    """Our bar in place of lm-eval's; a list that is walked through needs none."""
    if items is not None:
        return items
    title = {"Running loglikelihood requests": "lm-eval options", "Running generate_until requests": "lm-eval answers"}
    return progress_bar(title.get(desc or "", "lm-eval"), total=total or 0, unit="requests")


def _bootstrap_error(metric: Callable[[list[Any]], float], values: Sequence[Any], iters: int) -> float:
    """Standard error of a metric that is no mean; lm-eval's own forks processes beside running threads, and prints."""
    draw = random.Random(0)
    return statistics.stdev(float(metric(draw.choices(values, k=len(values)))) for _ in range(iters))


@contextlib.contextmanager
def _logger_to(name: str, handler: logging.Handler | None) -> Iterator[None]:
    """Send a library's log to one handler only, or nowhere."""
    logger = logging.getLogger(name)
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler or logging.NullHandler()], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate


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


def _listed(names: Iterable[str]) -> str:
    return f"[{','.join(names)}]"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__
