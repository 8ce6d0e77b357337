"""One finished run as the comparison sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import dotted, with_leaves
from trim_lightning.methods.base import whole_method
from trim_lightning.privacy.local import leaves
from trim_lightning.privacy.paths import is_path, shareable, told_apart
from trim_lightning.records.record_file import sha256_of
from trim_lightning.runs.find import Found
from trim_lightning.runs.manifest import BrokenRun, Manifest, read_json
from trim_lightning.runs.names import MANIFEST, METRICS, SELECTION
from trim_lightning.runs.selection import Coreset, read_selection
from trim_lightning.selection.ranking import DEFAULT_FRACTION
from trim_lightning.settings.key import known_keys
from trim_lightning.settings.schema import SelectSettings, TrainSettings

TRAINING_SECTIONS = ("coreset", "train", "evaluation")  # what a selection's config may hold and not use
SHARED_KEYS = ("max_length", "model.dtype")  # that selection and training both read
HOUSEKEEPING = ("paths", "logger", "report", "dry_run")  # where a run writes, and to whom it reports
SUFFIXES = ("_before", "_low", "_high")


@dataclass(frozen=True)
class Measurement:
    """One metric of one run: after training, with its interval and the value before, where they exist."""

    value: float
    low: float | None = None
    high: float | None = None
    before: float | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
        label: What tables call it.
        directory: Its output directory.
        kind: ``select`` or ``train``.
        config: Its config, as nested mappings.
        inputs: Its inputs with their sha256.
        coreset: What was selected, or trained on.
        numbers: The flat content of ``metrics.json``; empty for a selection.
    """

    label: str
    directory: Path
    kind: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    coreset: Coreset
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted config keys that matter to the result; a foreign coreset brings its selection's own."""
        known = whole_config(self.config, SelectSettings if self.kind == "select" else TrainSettings)
        if self.kind == "select":
            return {name: value for name, value in known.items() if not is_training_key(name)}
        if self.config.get("coreset", {}).get("path"):
            return self._with_given_coreset(known)
        return known

    def _with_given_coreset(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """The selection keys of the run that wrote the coreset, and the training keys of this one.

        This run's own selection keys chose nothing; those that also shape the training are kept under ``train``.
        """
        if self.coreset.config is None:
            chosen: dict[str, Any] = {"coreset.file": self.coreset.name}
        else:
            kept = whole_config(self.coreset.config, SelectSettings)
            chosen = {name: value for name, value in kept.items() if not is_training_key(name)}
        own = {name: value for name, value in known.items() if is_training_key(name) and name != "coreset.path"}
        shared = {f"train.{name}": known.get(name) for name in SHARED_KEYS if known.get(name) != chosen.get(name)}
        return {**chosen, **own, **shared, "train.model": trainee_of(self.config)}

    @property
    def method(self) -> str:
        """Name of the method that chose the coreset."""
        return self.coreset.method

    @property
    def seed(self) -> int | None:
        """Seed of the selection."""
        return self.coreset.config["seed"] if self.coreset.config else None

    @property
    def train_seed(self) -> int | None:
        """Seed of the training, None for a selection."""
        if self.kind == "select":
            return None
        own = self.config.get("train", {}).get("seed")
        return self.config.get("seed") if own is None else own

    @property
    def seed_text(self) -> str:
        """The seed, or ``selection/training`` where the two differ."""
        if self.train_seed is None or self.train_seed == self.seed:
            return text_of(self.seed)
        return f"{text_of(self.seed)}/{self.train_seed}"

    @property
    def scorer(self) -> str | None:
        """The model that scored the pool, None if no model did."""
        if not self.coreset.uses_model or self.coreset.config is None:
            return None
        return model_name(self.coreset.config["model"]["path"])

    @property
    def trainee(self) -> str | None:
        """The model that was fine-tuned, None for a selection."""
        return None if self.kind == "select" else model_name(trainee_of(self.config))

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.coreset.config is None:
            return f"{self.coreset.records} records"
        if self.coreset.takes_all:
            return "whole pool"
        budget = self.coreset.config["selection"]
        if budget.get("count") is not None:
            return f"{budget['count']} records"
        if budget.get("tokens") is not None:
            return f"{budget['tokens']} {'response ' if budget.get('token_scope') == 'response' else ''}tokens"
        share = budget.get("fraction")
        return f"{100 * (DEFAULT_FRACTION if share is None else share):g} %"

    @cached_property
    def measurements(self) -> dict[str, Measurement]:
        """Metrics under ``eval/`` by their name without it, e.g. ``nll`` or ``gsm8k/exact_match``."""
        found = {}
        for name, value in self.numbers.items():
            base = name.removeprefix("eval/")
            if base == name or base.endswith(SUFFIXES) or not is_number(value):
                continue
            parts = (self._number(f"{name}{suffix}") for suffix in ("_low", "_high", "_before"))
            found[base] = Measurement(float(value), *parts)
        return found

    @property
    def trained_tokens(self) -> float | None:
        """Tokens fed to the model in training, over all epochs."""
        return self._number("train/tokens")

    @property
    def labelled_tokens(self) -> float | None:
        """Tokens with a loss in training, over all epochs."""
        return self._number("train/trained_tokens")

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training."""
        return self._number("train/seconds")

    @property
    def select_seconds(self) -> float | None:
        """Seconds of the selection, None if it is unknown."""
        own = self._number("select/seconds")
        return self.coreset.seconds if own is None else own

    def _number(self, name: str) -> float | None:
        value = self.numbers.get(name)
        return float(value) if is_number(value) else None


def read_runs(found: Sequence[Found]) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read what can be read.

    Returns:
        The finished runs, and the label and reason of every other.
    """
    runs, broken = [], []
    for place in found:
        try:
            runs.append(read_run(place))
        except BrokenRun as error:
            broken.append((place.label, str(error)))
    return without_paths(runs), broken


def without_paths(runs: Sequence[Run]) -> list[Run]:
    """The runs with short texts for this machine's paths, different ones for different paths."""
    configs = [config for run in runs for config in (run.config, run.coreset.config) if config is not None]
    texts = told_apart([text for config in configs for _, text in leaves(config) if is_path(text)])

    def short(name: str, text: Any) -> Any:
        if isinstance(text, str) and text not in texts:  # the same few texts stand in every run of a sweep
            texts[text] = shareable(text)
        return texts[text] if isinstance(text, str) else text

    shown = [(with_leaves(run.config, short), with_leaves(run.coreset.config, short)) for run in runs]
    return [
        replace(run, config=config, coreset=replace(run.coreset, config=chosen))
        for run, (config, chosen) in zip(runs, shown, strict=True)
    ]


def read_run(place: Found) -> Run:
    """Read one run directory.

    Raises:
        BrokenRun: with the reason, if the run is unfinished or its files are damaged.
    """
    try:
        run = _read_run(place)
        check_shape(run)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise BrokenRun(f"{MANIFEST} or {METRICS} is not what a run writes ({reason})") from None
    return run


def check_shape(run: Run) -> None:
    """Ask once for everything that a comparison reads of a config, so that a foreign one fails here and not later.

    Raises:
        ValueError: if a value is of another kind than a run's.
        KeyError: if a key is not there.
        AttributeError: if a section is not a mapping.
        TypeError: likewise.
    """
    for seed in (run.seed, run.train_seed):
        if not (seed is None or is_number(seed)):
            raise ValueError("a seed is not a number")
    if any(len(name) > 1000 for name in run.settings):
        raise ValueError("a key is too long")
    _ = (run.method, run.scorer, run.trainee, run.budget, run.seed_text, run.coreset.pool)
    numbers = (run.trained_tokens, run.labelled_tokens, run.train_seconds, run.select_seconds)
    if len(numbers) + len(run.measurements) > 10_000:
        raise ValueError("too many metrics")


def _read_run(place: Found) -> Run:
    manifest = Manifest.read(place.directory)
    config, inputs = manifest.config, manifest.inputs
    for key in ("method", "model", "selection", "pool"):
        if not isinstance(config.get(key), Mapping):
            raise BrokenRun(f"{MANIFEST} has no config.{key}")
    if "coreset" not in inputs:
        return Run(place.label, place.directory, "select", config, inputs, read_selection(manifest))
    numbers = read_json(place.directory / METRICS)
    return Run(place.label, place.directory, "train", config, inputs, coreset_of(manifest, numbers), numbers)


def coreset_of(manifest: Manifest, numbers: Mapping[str, Any]) -> Coreset:
    """The coreset that a training run used: chosen by itself, by another run, or a file of unknown origin.

    Raises:
        BrokenRun: if the run's own selection is damaged.
    """
    given = manifest.config.get("coreset", {}).get("path")
    if not given:
        return read_selection(Manifest.read(manifest.directory / SELECTION))
    described = manifest.inputs["coreset"] if isinstance(manifest.inputs["coreset"], Mapping) else {}
    file = unchanged(given, described.get("sha256"))
    if file is not None:
        try:
            return read_selection(Manifest.read(file.parent))
        except BrokenRun:
            pass  # not the file of a selection, or not one as it was: only its lines are known
    records, tokens = numbers.get("selection/records"), numbers.get("selection/tokens")
    return Coreset(
        file=file,
        name=PurePosixPath(given).name,
        records=int(records if is_number(records) else described.get("rows", 0)),
        tokens=int(tokens) if is_number(tokens) else None,
    )


def unchanged(name: str, sha256: str | None) -> Path | None:
    """The path of a file if it is still there with these bytes."""
    try:
        path = Path(name).expanduser()
        return path if path.is_file() and sha256_of(path, name) == sha256 else None
    except (UserError, OSError, ValueError, RuntimeError):  # no name of a file that this system can have
        return None


def is_training_key(name: str) -> bool:
    """True for the dotted keys that a selection does not read."""
    return name.partition(".")[0] in TRAINING_SECTIONS


def whole_config(config: Mapping[str, Any], schema: type[SelectSettings]) -> dict[str, Any]:
    """Dotted keys of a run's config that matter to its result.

    Keys that a group has got since then have their defaults, so that runs of two versions can be of one kind.
    """
    with suppress(Exception):  # a method that is no more, or another's keys
        config = {**config, "method": whole_method(config["method"])}
    known = flatten({name: value for name, value in config.items() if name not in HOUSEKEEPING})
    for name, _, default in known_keys(schema):
        if (
            name not in known
            and name.partition(".")[0] not in (*HOUSEKEEPING, "method", "trainer")
            and default != "???"
        ):
            known[name] = frozen(default)
    return known


def flatten(value: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of the leaves; lists become tuples, so that every value can be hashed."""
    return {name: frozen(item) for name, item in dotted(value)}


def frozen(value: Any) -> Any:
    """A JSON value in a form that can be hashed."""
    if isinstance(value, Mapping):
        return tuple((name, frozen(item)) for name, item in value.items())
    return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value


def trainee_of(config: Mapping[str, Any]) -> str:
    """Path of the model that a training run trains."""
    return str(config.get("train", {}).get("model") or config["model"]["path"])


def model_name(path: str) -> str:
    """A model's path without its folders or the ``bundled:`` mark."""
    return path.rstrip("/").rpartition("/")[2].removeprefix("bundled:")


def is_number(value: Any) -> TypeGuard[float]:
    """True for a JSON number, NaN among them."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def text_of(value: Any) -> str:
    """A config value for a table."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(text_of(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def metric_names(runs: Sequence[Run]) -> Iterator[str]:
    """All metrics, our own three first, then in the order in which runs name them."""
    names = {name: None for run in runs for name in run.measurements}
    first = [name for name in ("nll", "nll_drop", "exact_match", "option_accuracy") if name in names]
    yield from first
    yield from (name for name in names if name not in first)
