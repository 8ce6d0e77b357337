"""What a scoring pass costs that keeps more than similarities: the model's errors, or what responses would teach."""

from __future__ import annotations

from typing import Any

import materials
from materials import in_turns, median
from passes import score
from trim_lightning.engine.scoring_pass import ScoringRequest

ROUNDS, RECORDS, TARGETS, GROUPS = 3, 250, 10, 5


def kept() -> dict[str, Any]:
    """Seconds of a pass for trim_plus, one group of ten targets, over a plain one; also five groups, and errors."""
    source = materials.smollm2()
    model = materials.model_of(source, materials.best_dtype())
    bank, pool = materials.bank_for(model), materials.tokens_of(source, RECORDS, "kept")
    others = materials.tokens_of(source, RECORDS + GROUPS * TARGETS, "kept-targets")
    targets = {
        str(group): [others[RECORDS + group * TARGETS + place] for place in range(TARGETS)] for group in range(GROUPS)
    }
    banks = dict.fromkeys(targets, bank)
    one = next(iter(targets))
    requests = {
        "plain": ScoringRequest({one: bank}, "embedding", "all"),
        "alignment": ScoringRequest({one: bank}, "embedding", "all", targets={one: targets[one]}),
        "plain, five groups": ScoringRequest(banks, "embedding", "all"),
        "alignment, five groups": ScoringRequest(banks, "embedding", "all", targets=targets),
        "errors": ScoringRequest({one: bank}, "embedding", "all", errors=True),
        "errors of responses": ScoringRequest({one: bank}, "embedding", "response", errors=True),
    }
    passes = [lambda request=request: score(model, pool, request=request) for request in requests.values()]
    seconds = dict(zip(requests, in_turns(ROUNDS, [model], *passes), strict=True))
    plain = {name: "plain, five groups" if "five" in name else "plain" for name in requests}
    rounds = {
        name: [own / bare for own, bare in zip(taken, seconds[plain[name]], strict=True)]
        for name, taken in seconds.items()
    }
    ratios = {name: median(found) for name, found in rounds.items()}
    response = int(pool.content_lengths("response").sum()) / pool.total_tokens
    return {
        "ratio": ratios["alignment"], "wanted": "<= 1.25", "ratios": ratios, "rounds": rounds,
        "response_share": round(response, 3), "tokens": pool.total_tokens, "pool": materials.pool_name(),
    }  # fmt: skip
