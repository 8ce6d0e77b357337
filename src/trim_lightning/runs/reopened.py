"""A finished selection, opened again: its settings, its scores, and what the store still holds of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trim_lightning.errors import UserError, first_line
from trim_lightning.models.source import ModelSource, find_model
from trim_lightning.records.record import Record
from trim_lightning.records.sources import open_records
from trim_lightning.runs.chosen import selection_directory
from trim_lightning.runs.manifest import BrokenRun, Manifest
from trim_lightning.runs.names import MANIFEST
from trim_lightning.runs.selection import read_scores
from trim_lightning.settings.schema import SelectSettings
from trim_lightning.stages.joined_passes import JoinedPasses
from trim_lightning.stages.scoring import SCORE_VERSION
from trim_lightning.stages.task import MatchedTokens
from trim_lightning.stages.token_scores import best_group
from trim_lightning.store import Store
from trim_lightning.store.inventory import KEY, receipt_of
from trim_lightning.store.receipt import StoreError
from trim_lightning.tokens.spans import RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords


@dataclass(frozen=True)
class OpenedRun:
    """A selection's files with its settings and its store.

    Attributes:
        manifest: Its manifest.
        settings: What it was asked.
        store: The stage store that it used.
        trusted: The user lets the model run code of its own if the run did.
    """

    manifest: Manifest
    settings: SelectSettings
    store: Store
    trusted: bool = False

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return self.manifest.directory

    @cached_property
    def scores(self) -> pa.Table:
        """The score of each pool record; see `read_scores`."""
        return read_scores(self.directory)

    @cached_property
    def source(self) -> ModelSource:
        """The scorer's files.

        Raises:
            UserError: if they are not there any more, or are others.
        """
        if self.settings.model.trust_remote_code and not self.trusted:
            raise UserError(
                "the run used model.trust_remote_code=true: if you trust this run directory and the code of its model "
                f"({self.settings.model.path}), add --trust-remote-code"
            )
        source = find_model(self.settings.model, self.store)
        if source.digest != self.manifest.sha256("model"):
            raise UserError(
                f"model.path={self.settings.model.path}: its files are not those that the run used; bring them back, "
                "or run the selection again"
            )
        return source

    def row_of(self, record_id: str) -> int:
        """The row with an id.

        Raises:
            UserError: if there is none, or more than one.
        """
        rows = pc.indices_nonzero(pc.equal(self.scores["id"], record_id)).to_pylist()
        if not rows:
            raise UserError(f"--id={record_id}: the pool has no such record; scores.parquet lists all ids")
        if len(rows) > 1:
            named = ", ".join(map(str, rows[:5]))
            raise UserError(f"--id={record_id}: {len(rows)} records have it (rows {named}); name one with --row")
        return int(rows[0])

    def stage(self, name: str) -> Path | None:
        """The directory of a stage's result, None if the store does not hold it (any more)."""
        stage = self.manifest.stages.get(name)
        return self._entry(name, stage.get("key") if isinstance(stage, dict) else None)

    @property
    def attention(self) -> Mapping[str, Any] | None:
        """The layers whose attention was read, of how many; None where the manifest does not say so."""
        stage = self.manifest.stages.get("fingerprint")
        found = stage.get("attention") if isinstance(stage, dict) else None
        if not isinstance(found, dict) or not isinstance(found.get("layers"), list) or "of" not in found:
            return None
        return found

    def _entry(self, name: str, key: object) -> Path | None:
        """The directory of an entry of the store, None if there is none."""
        if not isinstance(key, str) or not KEY.fullmatch(key):  # a manifest from elsewhere names no other folder
            return None
        path = self.store.root / name / key
        try:
            self.store.verify(path)
        except (FileNotFoundError, StoreError):
            return None
        return path

    def matched_tokens(self, row: int) -> MatchedTokens | None:
        """A record's tokens from the scoring pass, None if the store does not hold it any more as it is read now."""
        scoring = self.stage("score")
        if scoring is None:
            return None
        key = receipt_of(scoring)["key"]
        pool = self._entry("tokens", key["inputs"]["pool"]) if key["version"] == SCORE_VERSION else None
        if pool is None:
            return None
        beside = self._entry("score", key["inputs"].get("beside"))  # a cascade's sample
        passed = JoinedPasses([scoring, *([] if beside is None else [beside])], TokenizedRecords(pool))
        return passed.matched({row: self.group_of(row, passed.groups)}, self.settings.fallback).get(row)

    def response_tokens(self, row: int) -> int | None:
        """Response tokens of a record of the pool, None if the store does not hold its tokens any more."""
        stage = self.manifest.stages.get("tokenize")
        tokens = self._entry("tokens", stage.get("key") if isinstance(stage, dict) else None)
        return None if tokens is None else int((TokenizedRecords(tokens)[row].roles == RESPONSE).sum())

    def record(self, row: int) -> Record:
        """A record of the pool.

        Raises:
            UserError: if the pool cannot be read any more, or is another one.
        """
        settings = self.settings
        pool = open_records(
            settings.pool,
            what="pool",
            seed=settings.seed,
            spool=self.store.spool,
            limit=settings.pool.limit,
            sample=settings.pool.sample,
        )
        if pool.sha256 != self.manifest.sha256("pool"):
            raise UserError(f"pool {pool.name}: has changed since the run; bring the old file back, or select again")
        return pool.record(row)

    def group_of(self, row: int, groups: list[str]) -> str:
        """The target group, of these, that a record scores best for."""
        if groups == [""]:
            return ""
        columns = {group: self.scores[f"score/{group}"].to_numpy(zero_copy_only=False) for group in groups}
        return best_group({group: np.asarray(values, dtype=np.float64) for group, values in columns.items()}, row)


def open_run(path: Path, store: Path | None = None, *, trusted: bool = False) -> OpenedRun:
    """Open a selection run, or the selection of a training run.

    Args:
        path: Its output directory.
        store: The stage store, if it is not where it was.
        trusted: Let the model run code of its own if the run did; the manifest alone, which may be another's, cannot.

    Raises:
        UserError: if there is no finished selection.
    """
    directory = selection_directory(path)
    try:
        manifest = Manifest.read(directory)
    except BrokenRun as error:
        raise error.refusal(directory) from error
    try:
        settings = settings_from(manifest.config)
    except Exception as error:
        raise UserError(
            f"{directory / MANIFEST}: its config cannot be read ({first_line(error)}); select again"
        ) from None
    root = (store or Path(settings.paths.store_dir)).expanduser()
    if not root.is_dir():
        raise UserError(f"{root.absolute()}: the run's stage store is not there; name it with --store DIR")
    return OpenedRun(manifest, settings, Store(root, settings.paths.store_lock), trusted)


def settings_from(config: dict[str, Any]) -> SelectSettings:
    """Typed settings from a manifest's config; keys that selections do not have are left out."""
    from omegaconf import OmegaConf

    from trim_lightning.settings.compose import as_plain

    known = {field.name for field in dataclasses.fields(SelectSettings)}
    method, trainer = config["method"], config.get("trainer", {})
    plain = {name: value for name, value in config.items() if name in known - {"method", "trainer"}}
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SelectSettings), as_plain(plain)))
    assert isinstance(settings, SelectSettings)
    settings.method, settings.trainer = dict(method), dict(trainer)
    return settings
