"""Weights & Biases: whatever the service does, a run goes on."""

from __future__ import annotations

import functools
import logging
import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trim_lightning.errors import UserError, first_line
from trim_lightning.privacy.paths import shareable
from trim_lightning.settings.schema import LoggerSettings
from trim_lightning.tracking.tracker import Tracker

if TYPE_CHECKING:
    from trim_lightning.report.facts import Candidate, SelectionFacts

log = logging.getLogger(__name__)
PROMPT_ROLES = ("system", "user", "tool")
INIT_TIMEOUT = 60  # seconds for W&B's first answer (our choice)
MOST_TABLE_ROWS = 1000  # of the coreset, in a tracker's table


def harmless(method: Callable[..., None]) -> Callable[..., None]:
    """Let a tracker's method fail without ending the run: one warning, and no further calls."""

    @functools.wraps(method)
    def tried(self: WandbTracker, *arguments: Any, **keywords: Any) -> None:
        if self.lost:
            return
        try:
            method(self, *arguments, **keywords)
        except Exception as error:
            self.give_up(error)

    return tried


class WandbTracker(Tracker):
    """A Weights & Biases run; offline when there is no key, ``logger.offline`` is set, or the service does not answer.

    A fault of W&B after the start is told once, and the run goes on without it.

    Attributes:
        run: The run of W&B.
        lost: It failed, and is not spoken to any more.
    """

    def __init__(
        self,
        settings: LoggerSettings,
        directory: Path,
        *,
        job_type: str,
        name: str,
        config: Mapping[str, Any],
    ) -> None:
        self._log_artifacts = settings.log_artifacts
        self._made: dict[str, dict[str, str]] = {}
        self.lost = False
        mode = wandb_mode(settings.offline)
        if mode == "offline":
            log.info("W&B: logging offline; `wandb sync` uploads the run later")
        # it would call the server even offline, and tell it of our tracebacks
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        self._wandb = wandb
        # its metadata hold the command line, paths, user and host; our config says what matters
        quiet = wandb.Settings(
            console="off", silent=True, save_code=False, disable_git=True, x_disable_meta=True, host="hidden",
            init_timeout=min(INIT_TIMEOUT, settings.finish_timeout), finish_timeout=settings.finish_timeout,
        )  # fmt: skip

        def start(mode: Literal["online", "offline", "disabled"]) -> Any:
            return wandb.init(
                project=settings.project, entity=settings.entity, group=shareable(settings.group),
                tags=shareable(list(settings.tags)) or None, job_type=job_type, name=shareable(name),
                dir=str(directory), config=shareable(dict(config)), mode=mode, reinit="finish_previous", settings=quiet,
            )  # fmt: skip

        try:
            try:
                self.run = start(mode)
            except wandb.errors.UsageError:
                raise
            except wandb.Error as error:  # no network, no answer in time, no sense in it, or a key that is refused
                if mode == "offline":
                    raise
                log.warning("W&B: %s; logging offline, `wandb sync` uploads the run later", first_line(error))
                self.run = start("offline")
        except wandb.Error as error:
            raise UserError(f"logger=wandb: {first_line(error)}; set logger.offline=true") from None
        except ValueError as error:  # W&B checks what the environment and its own files say
            raise UserError(f"logger=wandb: {error}; mend that variable (WANDB_...) or W&B's settings file") from None
        with suppress(ImportError, AttributeError):
            # they tell W&B of imports, and would let an import fail after W&B's own process has died
            from wandb.sdk.lib.import_hooks import unregister_all_post_import_hooks

            unregister_all_post_import_hooks()

    def give_up(self, error: Exception) -> None:
        """Tell of a fault of W&B, and leave it alone from here on."""
        self.lost = True
        log.warning("W&B: %s; nothing more goes there, all results are in the output directory", first_line(error))
        with suppress(Exception):
            self._wandb.teardown(1)  # else it fails again, with a traceback, when the interpreter ends

    @harmless
    def metrics(self, values: Mapping[str, float | int | None]) -> None:
        """Log the numbers and keep them in the run's summary."""
        self.run.log({name: value for name, value in values.items() if value is not None})

    @harmless
    def artifact(self, name: str, kind: str, files: Sequence[Path], uses: Sequence[str] = ()) -> None:
        """Upload files as one artifact.

        Its metadata name those that it was made from, with their content digests: W&B's own link between
        artifacts of one run needs a server, and this must work offline. The files are not copied; they stay where
        they are until they are uploaded.
        """
        if not self._log_artifacts:
            return
        made_from = [self._made[used] for used in uses]
        artifact = self._wandb.Artifact(f"{name}-{self.run.id}", type=kind, metadata={"made_from": made_from})
        for file in files:
            if file.is_dir():
                artifact.add_dir(str(file), name=file.name, policy="immutable")
            elif file.exists():
                artifact.add_file(str(file), name=file.name, policy="immutable")
        self.run.log_artifact(artifact)
        self._made[name] = {"name": artifact.name, "type": kind, "digest": artifact.digest}

    @harmless
    def report(self, facts: SelectionFacts, page: Path) -> None:
        """Log the page and its tables."""
        wandb = self._wandb
        shown: dict[str, Any] = {"report/page": wandb.Html(page.read_text(encoding="utf-8"), inject=False)}
        for name, (columns, rows) in report_tables(facts).items():
            if rows:
                shown[f"report/{name}_table"] = wandb.Table(columns=columns, data=rows)
        with staging_in(Path(self.run.dir).parent):
            self.run.log(shown)

    @harmless
    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a W&B table; a column that holds values of several types is text."""
        columns: list[Any] = list(dict.fromkeys(column for row in rows for column in row))
        table = self._wandb.Table(columns=columns, allow_mixed_types=True)
        for row in rows:
            table.add_data(*(row.get(column) for column in columns))
        with staging_in(Path(self.run.dir).parent):
            self.run.log({name: table})

    def training_logger(self) -> Any:
        """Curves in the same run, logged as harmlessly as all else."""
        from lightning.pytorch.loggers import WandbLogger

        tracker = self

        class Curves(WandbLogger):
            def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
                tracker.point(super().log_metrics, metrics, step)

        return Curves(experiment=self.run)

    @harmless
    def point(self, log: Callable[..., None], metrics: Mapping[str, float], step: int | None) -> None:
        """Log one point of the curves."""
        log(metrics, step)

    @harmless
    def finish(self, succeeded: bool) -> None:
        """Close the run with its exit code."""
        self.run.finish(exit_code=0 if succeeded else 1)


@contextmanager
def staging_in(directory: Path) -> Iterator[None]:
    """Let W&B keep its copy of what is logged beside the run, not in the user's home, unless the user says where."""
    name = "WANDB_DATA_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(directory)
    try:
        yield
    finally:
        del os.environ[name]


def said_by(item: Candidate, roles: Sequence[str]) -> str:
    """The text of some roles' turns."""
    return "\n".join(text for role, text in item.turns if role in roles)


def report_tables(facts: SelectionFacts) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """The report's tables: columns and rows by name."""
    coreset = [
        [item.rank, item.id, item.score, item.num_tokens, said_by(item, PROMPT_ROLES), said_by(item, ("assistant",))]
        for item in facts.coreset[:MOST_TABLE_ROWS]
    ]
    mixes = [
        [mix.field, line.value, line.selected, line.coreset_share, line.pool_share]
        for mix in facts.mixes
        for line in mix.lines
    ]
    classes = [[item.text, item.token_id, item.mass, item.count, item.idf, item.group] for item in facts.classes]
    return {
        "coreset": (["rank", "id", "score", "tokens", "prompt", "response"], coreset),
        "mix": (["field", "value", "selected", "coreset_share", "pool_share"], mixes),
        "token_classes": (["token", "token_id", "mass", "count", "idf", "group"], classes),
    }


def wandb_mode(offline: bool) -> Literal["online", "offline", "disabled"]:
    """What W&B does: as ``logger.offline`` and ``WANDB_MODE`` say, and offline when there is no key."""
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted == "disabled":
        return "disabled"
    return "offline" if offline or wanted == "offline" or not has_wandb_key() else "online"


def has_wandb_key() -> bool:
    """True if W&B credentials are at hand: ``WANDB_API_KEY`` or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
