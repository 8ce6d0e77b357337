"""Processes that a command starts itself for one task, where no launcher has started any."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.loggers import Logger
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from trim_lightning.engine.ending import deferred
from trim_lightning.engine.trainer import ended_from_outside, hush_lightning, of_process
from trim_lightning.errors import UserError
from trim_lightning.store.processes import LaunchedProcesses, Processes, ToldElsewhere, is_lost

Value = TypeVar("Value")
log = logging.getLogger("trim_lightning")
logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # tells of every process that it ends
LOOK = 0.2  # seconds between two looks at what the processes say


def run_spawned(task: Callable[[Processes, Any], Value], number: int, logger: Any = False) -> Value:
    """Run a task in processes of this machine, as torchrun would start them, and end them with this one.

    Args:
        task: Called with its `Processes` and a Lightning logger (False in all but the first); can be pickled.
        number: How many processes.
        logger: A Lightning logger that gets the first process's curves, or False.

    Returns:
        What the task gives in the first process.

    Raises:
        UserError: what a process found wrong, or if one of them was ended from outside.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the first process runs on this one's device
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    heard, told = torch.multiprocessing.get_context("spawn").Pipe(duplex=False)
    context = torch.multiprocessing.start_processes(
        _begin, (pickle.dumps(task), number, port, told, bool(logger), log.getEffectiveLevel()), number, join=False
    )
    told.close()  # so that the pipe ends with the process that writes
    results: list[Value] = []

    def first_ends() -> None:
        with suppress(ProcessLookupError):
            os.kill(context.processes[0].pid, signal.SIGUSR1)

    with deferred(first_ends) as ending:
        try:
            done = False
            while not done:
                done = context.join(LOOK, grace_period=LOOK)
                _listen(heard, results, logger)
        except (ProcessRaisedException, ProcessExitedException) as error:
            if ending.asked is None:
                raise _cause(context, error) from None
        finally:
            for process in context.processes:
                with suppress(ProcessLookupError):
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGKILL)  # what it had finished is on disk
            heard.close()
    if not results:  # the first process was told to end, and this one was not
        raise KeyboardInterrupt
    if logger:
        logger.finalize("success")
    return results[0]


def _listen(heard: Connection, results: list[Any], logger: Any) -> None:
    with suppress(EOFError):
        while heard.poll():
            kind, *rest = heard.recv()
            if kind == "log":
                logging.getLogger(rest[0].name).handle(rest[0])
            elif kind == "curve":
                logger.log_metrics(*rest)
            else:
                results += rest


def _cause(context: Any, error: Exception) -> Exception:
    """The first reason among those of all processes: one that is lost leaves the others with an error as well."""
    texts = [
        pickle.loads(Path(file).read_bytes())
        for file in context.error_files
        if Path(file).exists() and os.path.getsize(file)
    ]
    texts = [text for text in texts if ToldElsewhere.__name__ not in text]
    known = [cause for cause in map(of_process, texts) if cause is not None]
    if known or texts:
        return known[0] if known else RuntimeError(texts[0])
    code = next((process.exitcode for process in context.processes if process.exitcode == -signal.SIGKILL), 1)
    return UserError(ended_from_outside("training", getattr(error, "exit_code", code)))


def _begin(rank: int, task: bytes, number: int, port: int, told: Connection, draws: bool, level: int) -> None:
    """What a started process does; a scheduler's signal may reach all of them, and the first one says what follows."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN if rank else signal.default_int_handler)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number),
    }  # fmt: skip
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // number))
    hush_lightning()
    if rank == 0:
        log.addHandler(_Sender(told))
    log.setLevel(level if rank == 0 else logging.ERROR)
    try:
        processes = LaunchedProcesses()
        result = pickle.loads(task)(processes, Curves(told) if draws and rank == 0 else False)
        if rank == 0:
            told.send(("result", result))
        processes.meet()
    except Exception as error:
        if is_lost(error):
            raise ToldElsewhere("another process has ended") from None
        raise
    torch.distributed.destroy_process_group()


class _Sender(QueueHandler):
    """Sends log records to the process that started this one."""

    def __init__(self, told: Connection) -> None:
        super().__init__(told)  # type: ignore[arg-type]

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send one."""
        self.queue.send(("log", record))  # type: ignore[attr-defined]


class Curves(Logger):
    """A Lightning logger that sends its points to the process that started this one."""

    def __init__(self, told: Connection) -> None:
        super().__init__()
        self._told = told

    @property
    def name(self) -> str:
        """Of the logger."""
        return "curves"

    @property
    def version(self) -> int:
        """Of the run."""
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send one point."""
        self._told.send(("curve", metrics, step))

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing: the run has them."""
