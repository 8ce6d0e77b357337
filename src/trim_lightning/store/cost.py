"""What building a stage result will cost, said beside the building, for plans made before anything is spent."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trim_lightning.settings.schema import TuningSettings


@dataclass(frozen=True, eq=False)
class Cost:
    """The work behind one stage result.

    Attributes:
        stage: Name in the manifest that it is booked under.
        count: Gives the real tokens that will be fed to the model; called only for a plan.
        work: Kind of work, a key of `trim_lightning.sweep.work.KINDS`; empty if its time cannot be said.
        load: Loads the model that runs it onto its device; called only to measure its speed.
        model: Equal where the same model is loaded in the same number format.
        records: What is fed to it (tokenised), to draw a sample from.
        tokens_per_batch: Padded tokens of a batch.
        training: Hyperparameters of the training, where the model's weights or a LoRA adapter get gradients.
        how_many: Gives how many there are of what the kind of work counts, see there; called only for a plan.
        how_many_answers: Gives the answers that are generated besides; called only for a plan.
        answer_tokens: Tokens of the longest of them.
        shared: Results with an equal value come from one pass when they are planned together; None for a pass of
            its own.
        devices: Devices that divide the tokens among themselves.
        per_machine: Those of one machine.
        divided: True if they divide the model's weights too (FSDP2).
        depth: Share of the model's layers that run.
        computed: Gives the share of the tokens that they run over, where prefixes are shared; called only for a plan.
        assumed: What had to be assumed about ``tokens``; empty if they are exact.
        loads: True if the model is loaded for this work alone.
    """

    stage: str
    count: Callable[[], int]
    work: str = ""
    load: Callable[[], Any] | None = None
    model: Hashable = None
    records: Any = None
    tokens_per_batch: int = 0
    training: TuningSettings | None = None
    how_many: Callable[[], float] = lambda: 1
    how_many_answers: Callable[[], int] = lambda: 0
    answer_tokens: int = 0
    shared: Hashable = None
    devices: int = 1
    per_machine: int = 1
    divided: bool = False
    depth: float = 1.0
    computed: Callable[[], float] = lambda: 1.0
    assumed: str = ""
    loads: bool = False

    @cached_property
    def tokens(self) -> int:
        """Real tokens that will be fed to the model."""
        return self.count()

    @cached_property
    def number(self) -> float:
        """How many there are of what the kind of work counts."""
        return self.how_many()

    @cached_property
    def answers(self) -> int:
        """Answers that are generated besides."""
        return self.how_many_answers()
