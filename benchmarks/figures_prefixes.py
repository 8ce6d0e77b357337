"""What sharing prefixes saves: pools whose records begin alike, and the pool as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import materials
from materials import WORK, in_turns, median
from passes import BUDGET, score
from trim_lightning.engine.prefixes import computed_share
from trim_lightning.tokens.tokenized import TokenizedRecords

KINDS = ((40, 120), (64, 128), (64, 64), (128, 64), (400, 100))  # tokens shared and own
TOKENS, ROUNDS, GROUPS = 12_000, 3, 3


def prefixes() -> dict[str, Any]:
    """Seconds of a scoring pass without `scoring.share_prefixes` over those with it, by how much records share."""
    source = materials.smollm2()
    model = materials.model_of(source, materials.best_dtype())
    bank, pool = materials.bank_for(model), materials.tokens_of(source, 400, "prefixes")
    found = {f"{shared} of {shared + own}": made(pool, shared, own) for shared, own in KINDS} | {"the pool": pool}
    figures = {}
    for name, records in found.items():
        plain, shared = in_turns(
            ROUNDS,
            [model],
            lambda records=records: score(model, records, bank),  # type: ignore[misc]
            lambda records=records: score(model, records, bank, share_prefixes=True),  # type: ignore[misc]
        )
        spared = 1 - computed_share(records, BUDGET)
        ratios = [one / two for one, two in zip(plain, shared, strict=True)]
        figures[name] = {"ratio": median(ratios), "rounds": ratios, "spared": spared, "least": 1 / (1 - spared)}
    return {"ratio": figures["128 of 192"]["ratio"], "wanted": "reported", "kinds": figures}


def made(pool: TokenizedRecords, shared: int, own: int) -> TokenizedRecords:
    """Records of the pool's tokens: one of three prefixes, and ``own`` tokens of their own, a third more or less."""
    flat = np.concatenate([pool[row].token_ids for row in range(len(pool))])
    draw = np.random.default_rng(0)
    number = TOKENS // (shared + own)
    lengths = shared + draw.integers(own * 2 // 3, own * 4 // 3, number)
    starts = draw.integers(GROUPS * shared, len(flat) - own * 2, number)
    sequences = [
        np.concatenate([flat[place % GROUPS * shared :][:shared], flat[start : start + length - shared]])
        for place, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    directory = Path(WORK, f"prefixes-{shared}-{own}")
    directory.mkdir(parents=True, exist_ok=True)
    np.concatenate(sequences).astype(np.int32).tofile(directory / "token_ids.int32")
    np.ones(int(lengths.sum()), np.uint8).tofile(directory / "roles.uint8")
    np.append(0, np.cumsum(lengths)).astype(np.int64).tofile(directory / "offsets.int64")
    (directory / "summary.json").write_text(json.dumps({"truncated": 0, "unrendered": 0, "problems": []}))
    return TokenizedRecords(directory)
