"""The pass over the pool that a selection wants, before it is run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.store import Entry, StageKey
from trim_lightning.tokens.tokenized import SomeRecords, TokenizedRecords, TokenSequence

if TYPE_CHECKING:
    from trim_lightning.engine.devices import Resources
    from trim_lightning.engine.scoring_pass import ScoringRequest


# the contract's files about tokens
BANKS, TARGETS, TOKEN_SCORES = "fingerprints.safetensors", "target_tokens.parquet", "token_scores.parquet"
SCORE_VERSION = 2  # of what a pass over the pool leaves
KEPT = ("errors", "alignment", "states")  # beside similarities, by their names in a pass's key


def scoring_kind(kept: Iterable[str]) -> str:
    """A key of `trim_lightning.sweep.work.KINDS` for a pass that keeps some of `KEPT`, in their order."""
    return " with ".join(["scoring pass", *kept])


@dataclass(frozen=True)
class ScoringWork:
    """A pass over the pool that a selection wants.

    Attributes:
        key: Key of its result.
        banks: The fingerprint banks.
        resources: What it runs on.
        rows: Those of the pool that it reads; None: all.
        targets: Group name to its targets, where it keeps what the model would learn from each response.
    """

    key: StageKey
    banks: Entry
    resources: Resources
    rows: NDArray[np.int64] | None = None
    targets: Mapping[str, Sequence[TokenSequence]] = field(default_factory=dict, repr=False)

    def of(self, rows: NDArray[np.int64], beside: StageKey | None = None) -> ScoringWork:
        """The same of some rows of the pool only; the pass ``beside`` it has others."""
        chosen = {"rows": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()}
        if beside is not None:
            chosen["beside"] = beside.hex
        return replace(self, key=replace(self.key, inputs={**self.key.inputs, **chosen}), rows=rows)

    def records(self, pool: TokenizedRecords) -> TokenizedRecords:
        """What the pass reads."""
        return pool if self.rows is None else SomeRecords(pool, self.rows)

    def request(self) -> ScoringRequest:
        """What the pass computes; reads the banks."""
        from trim_lightning.engine.scoring_pass import ScoringRequest
        from trim_lightning.stages.fingerprints import load_banks

        settings = self.key.settings
        banks = load_banks(self.banks.path / BANKS)
        targets = {group: self.targets[group] for group in banks} if self.targets else {}
        errors, states = settings.get("errors", False), settings.get("states", False)
        return ScoringRequest(banks, settings["nearest"], settings["scope"], errors, targets, states)

    @property
    def kind(self) -> str:
        """A key of `trim_lightning.sweep.work.KINDS`."""
        return scoring_kind(name for name in KEPT if self.key.settings.get(name))

    def shares_pass_with(self, other: ScoringWork) -> bool:
        """True if one forward pass serves both: same pool, same scorer, same batches, prefixes shared or not."""
        return self.pass_identity == other.pass_identity

    @property
    def pass_identity(self) -> list[Any]:
        """What a forward pass depends on, whatever is read from it."""
        inputs = self.key.inputs
        settings = self.key.settings
        rows = [inputs.get("rows"), settings.get("unknown")]
        return [inputs["pool"], rows, inputs["scorer"], settings["tokens_per_batch"], self.shares_prefixes]

    @property
    def shares_prefixes(self) -> bool:
        """``scoring.share_prefixes``."""
        return bool(self.key.settings["share_prefixes"])
