"""Experiment tracking: a CSV file, or Weights & Biases with an offline fallback."""

from __future__ import annotations

import csv
import io
import logging
import netrc
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trim_lightning.errors import UserError
from trim_lightning.outputs import write_text
from trim_lightning.privacy import shareable
from trim_lightning.settings import LoggerSettings

if TYPE_CHECKING:
    from trim_lightning.report.facts import Candidate, SelectionFacts

log = logging.getLogger(__name__)
PROMPT_ROLES = ("system", "user", "tool")
MOST_TABLE_ROWS = 1000  # of the coreset, in a tracker's table


class Tracker(ABC):
    """What a run reports to."""

    @abstractmethod
    def metrics(self, values: Mapping[str, float | int | None]) -> None:
        """Report final numbers under ``stage/name`` keys."""

    @abstractmethod
    def artifact(self, name: str, kind: str, files: Sequence[Path], uses: Sequence[str] = ()) -> None:
        """Attach files as a versioned artifact; ``uses`` names artifacts of this run that it was made from."""

    @abstractmethod
    def report(self, facts: SelectionFacts, page: Path) -> None:
        """Show a selection: its page, its pictures and its tables."""

    @abstractmethod
    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report a table: one mapping of column to value per row."""

    @abstractmethod
    def training_logger(self) -> Any:
        """A Lightning logger for the curves of a training, or False."""

    @abstractmethod
    def finish(self, succeeded: bool) -> None:
        """Close the run, so that the next job of a multirun opens its own."""


class NoTracker(Tracker):
    """Reports to nobody."""

    def metrics(self, values: Mapping[str, float | int | None]) -> None:
        """Drop the numbers."""

    def artifact(self, name: str, kind: str, files: Sequence[Path], uses: Sequence[str] = ()) -> None:
        """Attach nothing."""

    def report(self, facts: SelectionFacts, page: Path) -> None:
        """Show nothing: the page is in the output directory."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Drop it."""

    def training_logger(self) -> Any:
        """No curves."""
        return False

    def finish(self, succeeded: bool) -> None:
        """Nothing to close."""


class CsvTracker(NoTracker):
    """Writes the final numbers to ``metrics.csv`` in the output directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "metrics.csv"
        self._values: dict[str, Any] = {}

    def metrics(self, values: Mapping[str, float | int | None]) -> None:
        """Add numbers and write the file anew."""
        self._values.update(values)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["metric", "value"])
        writer.writerows(sorted(self._values.items()))
        write_text(text.getvalue(), self.path)

    def training_logger(self) -> Any:
        """Curves in ``training/metrics.csv``."""
        from lightning.pytorch.loggers import CSVLogger

        return CSVLogger(self.path.parent, name="training", version="")


class WandbTracker(Tracker):
    """A Weights & Biases run; offline when there is no key or ``logger.offline`` is set."""

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
        mode = wandb_mode(settings.offline)
        if mode == "offline":
            log.info("W&B: logging offline; `wandb sync` uploads the run later")
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # it would call the server even so
        import wandb

        self._wandb = wandb
        try:
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=shareable(settings.group),
                tags=shareable(list(settings.tags)) or None,
                job_type=job_type,
                name=shareable(name),
                dir=str(directory),
                config=shareable(dict(config)),
                mode=mode,
                reinit="finish_previous",
                # its metadata hold the command line, paths, user and host; our config says what matters
                settings=wandb.Settings(
                    console="off", silent=True, save_code=False, disable_git=True, x_disable_meta=True, host="hidden"
                ),
            )
        except wandb.Error as error:
            raise UserError(f"logger=wandb: {str(error).splitlines()[0]}; set logger.offline=true") from None

    def metrics(self, values: Mapping[str, float | int | None]) -> None:
        """Log the numbers and keep them in the run's summary."""
        self.run.log({name: value for name, value in values.items() if value is not None})

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

    def report(self, facts: SelectionFacts, page: Path) -> None:
        """Log the page, its pictures as images, and its tables."""
        from trim_lightning.report.pictures import pictures

        wandb = self._wandb
        shown: dict[str, Any] = {"report/page": wandb.Html(page.read_text(encoding="utf-8"), inject=False)}
        for name, figure in pictures(facts):
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=150)
            shown[f"report/{name}"] = wandb.Image(png(picture), caption=name.replace("_", " "))
        for name, (columns, rows) in report_tables(facts).items():
            if rows:
                shown[f"report/{name}_table"] = wandb.Table(columns=columns, data=rows)
        with staging_in(Path(self.run.dir).parent):
            self.run.log(shown)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a W&B table; a column that holds values of several types is text."""
        columns: list[Any] = list(dict.fromkeys(column for row in rows for column in row))
        table = self._wandb.Table(columns=columns, allow_mixed_types=True)
        for row in rows:
            table.add_data(*(row.get(column) for column in columns))
        with staging_in(Path(self.run.dir).parent):
            self.run.log({name: table})

    def training_logger(self) -> Any:
        """Curves in the same run."""
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(experiment=self.run)

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


def png(picture: io.BytesIO) -> Any:
    """A picture as the tracker takes it."""
    from PIL import Image

    picture.seek(0)
    return Image.open(picture)


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


def open_tracker(
    settings: LoggerSettings, directory: Path, *, job_type: str, name: str, config: Mapping[str, Any]
) -> Tracker:
    """The tracker that ``logger.name`` asks for."""
    if settings.name == "none":
        return NoTracker()
    if settings.name == "csv":
        return CsvTracker(directory)
    return WandbTracker(settings, directory, job_type=job_type, name=name, config=config)
