"""lm-eval without its own log lines and progress bars; what it warns of is heard."""

from __future__ import annotations

import contextlib
import logging
import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trim_lightning.console.progress import progress_bar
from trim_lightning.evaluation.harness.tasks import _replaced


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
