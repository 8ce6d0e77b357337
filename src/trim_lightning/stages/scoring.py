"""The pass over the pool that a selection wants, before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trim_lightning.store import Entry, StageKey

if TYPE_CHECKING:
    from trim_lightning.engine.devices import Resources
    from trim_lightning.engine.scoring_pass import ScoringRequest


# the contract's files about tokens
BANKS, TARGETS, TOKEN_SCORES = "fingerprints.safetensors", "target_tokens.parquet", "token_scores.parquet"
SCORE_VERSION = 2  # of what a pass over the pool leaves


@dataclass(frozen=True)
class ScoringWork:
    """A pass over the pool that a selection wants.

    Attributes:
        key: Key of its result.
        banks: The fingerprint banks.
        resources: What it runs on.
    """

    key: StageKey
    banks: Entry
    resources: Resources

    def request(self) -> ScoringRequest:
        """What the pass computes; reads the banks."""
        from trim_lightning.engine.scoring_pass import ScoringRequest
        from trim_lightning.stages.fingerprints import load_banks

        settings = self.key.settings
        return ScoringRequest(load_banks(self.banks.path / BANKS), settings["nearest"], settings["scope"])

    def shares_pass_with(self, other: ScoringWork) -> bool:
        """True if one forward pass serves both: same pool, same scorer, same batches."""
        return self.pass_identity == other.pass_identity

    @property
    def pass_identity(self) -> list[Any]:
        """What a forward pass depends on, whatever is read from it."""
        return [self.key.inputs["pool"], self.key.inputs["scorer"], self.key.settings["tokens_per_batch"]]
