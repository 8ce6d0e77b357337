"""Keys that a user gave and that nothing of the run reads: said, so that a wrong idea of a run does not last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trim_lightning.methods.base import load_selector
from trim_lightning.settings.schema import SelectSettings, TrainSettings

TOKEN_KEYS = ("saliency", "fingerprint", "fallback", "pooler", "scoring.save_token_scores")
POOLERS_OF = {
    "pooler.mean_weight": ("mean_max_coverage", "mean_max"),
    "pooler.max_weight": ("mean_max_coverage", "mean_max"),
    "pooler.coverage_weight": ("mean_max_coverage",),
    "pooler.k": ("topk_mean",),
    "pooler.temperature": ("softmax_mean",),
    "pooler.q": ("quantile",),
}  # a pooler's keys and the formulas that have them
# keys of a selection, but those that `warn_of_unused` names where the coreset is opened
OF_SELECTION = (
    "method", "target", "warmup", "saliency", "fingerprint", "fallback", "pooler", "scoring", "scope",
)  # fmt: skip
OF_HELD_OUT = ("target", "target.source", "target.families")  # keys that evaluation=generated reads
GENERATED = ("families", "per_family", "generator_seed")  # keys of generated records


def unused_keys(settings: SelectSettings, overrides: Sequence[str]) -> list[str]:
    """One line for each reason why overrides of the command line change nothing; empty where all are read.

    Args:
        settings: What the command line comes to.
        overrides: As they were given, ``key=value``; what a recipe or an option sets is none of them.

    Raises:
        UserError: for an unknown method.
    """
    # records of the targets' kind may be generated to measure
    read = OF_HELD_OUT if isinstance(settings, TrainSettings) and settings.evaluation.generated else ()
    if isinstance(settings, TrainSettings) and settings.coreset.path is not None:
        return remarks([("coreset.path", lambda key: is_under(key, OF_SELECTION) and key not in read)], overrides)
    selector = load_selector(settings.method)
    method, pooler = f"method={settings.method['name']}", f"pooler={settings.pooler.name}"
    reasons: list[tuple[str, Callable[[str], bool]]] = []
    if not selector.matches_tokens:
        reasons.append((method, lambda key: is_under(key, TOKEN_KEYS)))
    else:
        reasons.append((pooler, lambda key: settings.pooler.name not in POOLERS_OF.get(key, (settings.pooler.name,))))
        saliency = settings.saliency
        if saliency.row_weight == saliency.column_weight == 0:
            unread = ("saliency.num_layers", "saliency.normalize")
            reasons.append(("saliency.row_weight=0 saliency.column_weight=0", lambda key: key in unread))
        if settings.fallback.mode == "zero":
            reasons.append(("fallback.mode=zero", lambda key: key == "fallback.penalty"))
    if getattr(selector, "alignment_weight", 1) == 0:
        reasons.append(("method.alignment_weight=0", lambda key: key == "method.length_exponent"))
    if getattr(selector, "trim_weight", 1) == 0:
        reasons.append(("method.trim_weight=0", lambda key: is_under(key, ("saliency", "fallback", "pooler"))))
    if not selector.needs_targets:
        reasons.append((method, lambda key: is_under(key, ("target",)) and key not in read))
    if getattr(selector, "use_warmup", True) is False:
        reasons.append((f"{method} method.use_warmup=false", lambda key: is_under(key, ("warmup",))))
    elif selector.uses_model and not settings.warmup.enabled:
        reasons.append(("warmup=none", lambda key: is_under(key, ("warmup",)) or key == "method.use_warmup"))
    elif not selector.warms_up(settings):
        reasons.append((method, lambda key: is_under(key, ("warmup",))))
    for name, source in (("pool", settings.pool.source), ("target", settings.target.source)):
        if source != "generated":
            own = tuple(f"{name}.{key}" for key in GENERATED)
            reasons.append((f"{name}={source}", lambda key, own=own: key in own))  # type: ignore[misc]
    if not settings.warmup.enabled:  # switching off what is not there is no mistake
        overrides = [given for given in overrides if key_of(given) not in ("warmup", "warmup.enabled")]
    return remarks(reasons, overrides)


def key_of(override: str) -> str:
    """The key or group of an override."""
    return override.lstrip("+~").partition("=")[0]


def remarks(reasons: Sequence[tuple[str, Callable[[str], bool]]], overrides: Sequence[str]) -> list[str]:
    """One line for each reason that holds for some overrides, the first reason for each."""
    unread: dict[str, list[str]] = {}
    for key in dict.fromkeys(map(key_of, overrides)):
        reason = next((reason for reason, holds in reasons if holds(key)), None)
        if reason is not None:
            unread.setdefault(reason, []).append(key)
    return [
        f"{', '.join(keys)}: {'has' if len(keys) == 1 else 'have'} no effect with {reason}"
        for reason, keys in unread.items()
    ]


def is_under(key: str, groups: Sequence[str]) -> bool:
    """True for a group, and for a key of one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)
