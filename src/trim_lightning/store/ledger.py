"""What a run did: its stages with time and tokens, and what the user should know."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trim_lightning.store import Entry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run.

    Attributes:
        key: Its store key (hex), or None for a stage that is not stored.
        seconds: Wall time of the stage, loading and converting the model excluded; of the first time if cached.
        tokens: Real tokens fed to the model, scaffolding included, padding not.
        cached: True if the result was found in the store.
        versions: Package to the version that it was computed with, to all of them where several results add up; None
            if that is not known.
        lora: What a training of LoRA trained, see `trim_lightning.models.lora.lora_facts`; None of other stages.
        attention: The ``layers`` whose attention was read ``of`` how many, where that is not all of the last ones.
    """

    key: str | None
    seconds: float
    tokens: int
    cached: bool
    versions: Mapping[str, str] | None = None
    lora: Mapping[str, Any] | None = None
    attention: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The form in ``manifest.json``."""
        rate = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return {
            "key": self.key,
            "seconds": round(self.seconds, 4),
            "tokens": self.tokens,
            "tokens_per_second": round(rate, 2),
            "cached": self.cached,
            "versions": None if self.versions is None else dict(self.versions),
            **({} if self.lora is None else {"lora": dict(self.lora)}),
            **({} if self.attention is None else {"attention": dict(self.attention)}),
        }


@dataclass
class Ledger:
    """Collects stage records and warnings during a run.

    Attributes:
        stages: Stage name to what was booked.
        warnings: What the user should know.
        figures: Others, of the run as a whole.
        quiet: Keep to itself what another run will say again: warnings, and what came from the store.
        under: Name of the stage that everything is booked under; empty keeps each stage's own.
    """

    stages: dict[str, StageRecord] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False
    under: str = ""

    def within(self, stage: str) -> Ledger:
        """The same ledger for a part of the run that counts as one stage; its figures are its own."""
        return Ledger(self.stages, self.warnings, quiet=self.quiet, under=stage)

    def book(self, stage: str, entry: Entry) -> None:
        """Add a stored result to a stage; several results of one stage add up."""
        stage = self.under or stage
        facts: Mapping[str, Any] = entry.facts
        if entry.cached and stage not in self.stages and not self.quiet:
            log.info("%s: from the store", stage)
        seconds, tokens = float(facts.get("seconds", 0.0)), int(facts.get("tokens", 0))
        about = (facts.get("lora"), facts.get("attention"))
        record = StageRecord(entry.key.hex, seconds, tokens, entry.cached, entry.versions, *about)
        if record.tokens and not entry.cached:
            log.info("%s: %s tokens in %.1f s", stage, f"{record.tokens:,}", record.seconds)
        self.add(stage, record)

    def add(self, stage: str, record: StageRecord) -> None:
        """Add a stage record to what is booked for that stage."""
        before = self.stages.get(stage)
        if before is not None:
            record = StageRecord(
                record.key,
                before.seconds + record.seconds,
                before.tokens + record.tokens,
                before.cached and record.cached,
                together(before.versions, record.versions),
                record.lora,
                record.attention,
            )
        self.stages[stage] = record

    def warn_of_versions(self, now: Mapping[str, str]) -> None:
        """Say in one line which results come from other versions than those of now."""
        stages: dict[str, list[str]] = {}
        for name, record in self.stages.items():
            changes = [
                f"{package} {then} (now {now.get(package, 'none')})"
                for package, then in (record.versions or {}).items()
                if then != now.get(package)
            ]
            if changes:
                stages.setdefault(", ".join(changes), []).append(name)
        if stages:
            told = "; ".join(f"{', '.join(names)} with {changes}" for changes, names in stages.items())
            self.warn(f"results in the store were computed with other versions: {told}")

    def warn(self, message: str) -> None:
        """Tell the user now and note it in the manifest."""
        if self.under and message in self.warnings:
            return  # a part that meets the same records again
        if not self.quiet:
            log.warning(message)
        self.warnings.append(message)


def together(one: Mapping[str, str] | None, other: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The versions behind two results; None if those of either are not known."""
    if one is None or other is None:
        return None
    return {
        package: ", ".join(dict.fromkeys(found[package] for found in (one, other) if package in found))
        for package in {**one, **other}
    }
