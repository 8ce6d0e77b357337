"""Finding and loading lm-eval's tasks and our local ones, without its log lines and bars; its warnings are heard."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trim_lightning.console.progress import progress_bar, replaced
from trim_lightning.errors import UserError, suggest
from trim_lightning.records.sources import no_progress_bars
from trim_lightning.settings.schema import EvaluationSettings

TASKS_FOLDER = Path(__file__).parents[1] / "tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in TASKS_FOLDER.glob("trim_*.yaml")))
PROBE_SECONDS = 5.0
DATA_VARIABLE = "TRIM_DATA_DIR"


def _check_installed() -> None:
    remedy = "run pip install 'trim-lightning[eval]'"
    try:
        from lm_eval import __version__
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"evaluation.tasks: needs the library lm-eval; {remedy}") from None
    if not hasattr(TaskManager, "load"):
        raise UserError(f"evaluation.tasks: lm-eval {__version__} is too old; {remedy}")


@dataclass
class _Loaded:
    """What the names stand for: lm-eval's objects, and the names whose scores are reported."""

    objects: list[Any] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)
    reported: list[str] = field(default_factory=list)


def _task_manager(settings: EvaluationSettings) -> Any:
    """An index of tasks that knows every name."""
    folders = [str(TASKS_FOLDER)]
    stamp: tuple[tuple[str, int], ...] = ()
    if settings.tasks_path is not None:
        stamp = _check_task_files(settings.tasks_path)
        folders.append(str(Path(settings.tasks_path).expanduser()))
    manager = _index(tuple(folders), stamp, settings.data_dir, False)
    if all(name in manager.task_index for name in settings.tasks):
        return manager
    manager = _index(tuple(folders), stamp, settings.data_dir, True)
    for name in settings.tasks:
        if name not in manager.task_index:
            hint = suggest(name, manager.all_tasks) or ";"
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


def local_folder(settings: EvaluationSettings) -> Path:
    """Where the local tasks' files are."""
    return Path(settings.data_dir or os.environ.get(DATA_VARIABLE) or os.devnull).expanduser()


def local_test_files(settings: EvaluationSettings) -> dict[str, Path]:
    """Each local task that is asked for, to the file of its test records, if that is there."""
    files = {
        name: local_folder(settings) / f"{name.removeprefix('trim_')}.test.jsonl"
        for name in settings.tasks
        if name in LOCAL_TASKS
    }
    return {name: path for name, path in files.items() if path.is_file()}


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

    with replaced(constants, "HF_HUB_OFFLINE", True), replaced(datasets.config, "HF_HUB_OFFLINE", True):
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


# ---------------------------------------------------------------- lm-eval without its own log lines and bars


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
    import lm_eval.api.metrics
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    from transformers.utils import logging as transformers_logging

    heard = _Hearing()
    level = transformers_logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_progress_bars())
        stack.enter_context(replaced(lm_eval.models.huggingface, "tqdm", _bar))
        for module in (lm_eval.api.task, lm_eval.api.model):
            stack.enter_context(replaced(module, "tqdm", lambda items, **_: items))
        # they start git and pip, whose answers the manifest has already
        stack.enter_context(replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: None))
        stack.enter_context(replaced(lm_eval.evaluator, "add_env_info", lambda results: None))
        stack.enter_context(replaced(lm_eval.api.metrics, "bootstrap_stderr", _bootstrap_error))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_logger_to("lm_eval", heard))
        for name in ("httpx", "httpx2", "huggingface_hub", "datasets", "evaluate", "fsspec"):
            stack.enter_context(_logger_to(name, None))
        transformers_logging.set_verbosity_error()
        try:
            yield heard.messages
        finally:
            transformers_logging.set_verbosity(level)


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


def _listed(names: Iterable[str]) -> str:
    return f"[{','.join(names)}]"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__
