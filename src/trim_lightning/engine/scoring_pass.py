"""Run the scoring pass over the pool: shards of token similarities, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trim_lightning.engine.batches import WINDOW, padding_share, plan_shards
from trim_lightning.engine.devices import Resources, is_divided
from trim_lightning.engine.modules import ScoringPass
from trim_lightning.engine.prefixes import prefix_groups, spared_tokens
from trim_lightning.engine.sharded_pass import run_sharded_pass
from trim_lightning.engine.shards import Elapsed, write_tensors
from trim_lightning.engine.token_shards import MATCHES, ROWS, SharedShards, TokenShards
from trim_lightning.files.atomic import write_atomically
from trim_lightning.models.load import ModelRecipe
from trim_lightning.tokens.tokenized import SomeRecords, TokenizedRecords, TokenSequence
from trim_lightning.trim.fingerprints import FingerprintBank


@dataclass(frozen=True)
class ScoringRequest:
    """What one reader wants of a scoring pass.

    Attributes:
        banks: Group name to bank.
        nearest: ``fallback.nearest``.
        scope: Content tokens that count.
        errors: Keep the model's error at each scoped token too.
        targets: Group name to its targets, in the order of the banks, where it is to be kept too what the model would
            learn from each response; else empty.
        states: Keep the mean state of each response as well.
    """

    banks: Mapping[str, FingerprintBank]
    nearest: str
    scope: str
    errors: bool = False
    targets: Mapping[str, Sequence[TokenSequence]] = field(default_factory=dict)
    states: bool = False


@dataclass
class Targets:
    """The groups of targets that readers of a pass have, each once."""

    groups: list[Sequence[TokenSequence]] = field(default_factory=list)
    _known: list[tuple[bytes, ...]] = field(default_factory=list)

    def place(self, group: Sequence[TokenSequence]) -> int:
        """Where a group stands; one with other tokens is put behind."""
        content = tuple(part.tobytes() for target in group for part in target)
        if content not in self._known:
            self._known.append(content)
            self.groups.append(group)
        return self._known.index(content)


def error_scopes(requests: Iterable[ScoringRequest]) -> list[str]:
    """The scopes whose tokens' errors some requests want."""
    return [request.scope for request in requests if request.errors]


def run_scoring_pass(
    model: PreTrainedModel | ModelRecipe,
    records: TokenizedRecords,
    requests: Mapping[Path, ScoringRequest],
    *,
    resources: Resources,
    share_prefixes: bool = False,
) -> dict[str, Any]:
    """One forward over the pool; every token meets its fingerprint in every bank of every request.

    Requests stand by the directory where their shards go; those of an earlier attempt are kept. Each directory gets
    the same bytes, whoever shares the pass. ``share_prefixes``: see `ScoringPass`.

    Returns:
        ``seconds`` over all attempts, ``tokens`` of the whole pool, ``shards``, the ``padding`` share, the ``spared``
        share of the tokens, which were computed once for several records, and how many requests it ``served``.
    """
    groups = prefix_groups(records, resources.tokens_per_batch) if share_prefixes else None
    plan = plan_shards(records.lengths, resources.tokens_per_batch, groups=groups)
    banks: list[tuple[FingerprintBank, str]] = []
    readers, tables, targets = [], {}, Targets()
    for directory, request in requests.items():
        reader = TokenShards(
            directory,
            len(request.banks),
            request.scope,
            request.nearest,
            len(banks),
            request.errors,
            [targets.place(group) for group in request.targets.values()],
            request.states,
        )
        readers.append(reader)
        if reader.has_table:
            tables[directory / MATCHES] = reader.banks
        banks += [(bank, request.nearest) for bank in request.banks.values()]
    module = ScoringPass(
        model,
        banks,
        tables,
        share_prefixes and not is_divided(resources.trainer),
        error_scopes(requests.values()),
        targets.groups,
        any(request.states for request in requests.values()),
    )
    seconds = run_sharded_pass(
        module,
        records,
        plan,
        SharedShards(readers) if len(readers) > 1 else readers[0],
        next(iter(requests)),
        resources=resources,
        title="score",
    )
    for directory in list(requests)[1:]:
        Elapsed(directory).finish()  # of an attempt that nobody shared
    facts = {
        "tokens": records.total_tokens,
        "shards": len(plan),
        "padding": padding_share(records.lengths, plan),
        "spared": spared_tokens(records, plan) / max(records.total_tokens, 1) if module.shares else 0.0,
    }
    for directory, request in requests.items():
        noted = {
            **facts,
            "shard_records": [sum(map(len, shard.batches)) for shard in plan],
            "groups": list(request.banks),
            "scope": request.scope,
            "window": WINDOW,
            **({"alignment": True} if request.targets and request.scope != "prompt" else {}),
        }
        if resources.processes.leads:
            if isinstance(records, SomeRecords):
                write_tensors(directory / ROWS, {"rows": records.rows})
            write_atomically(directory / "shards.json", json.dumps(noted))
    return {"seconds": seconds, **facts, "served": len(requests)}
