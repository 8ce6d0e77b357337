"""Versions of Python and of the packages that a stage's result depends on: in receipts, and the coarse part in keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

# what a receipt records
PACKAGES = (
    "trim-lightning",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "peft",
    "numpy",
    "sentence-transformers",
    "bitsandbytes",
)

# Which packages change the tokens or numbers of a stage by themselves. What is made from stored results alone has them
# in the keys of those; a stage that is not listed is taken to run a model.
TOKENS, MODEL, ADAPTER = ("tokenizers", "transformers"), ("torch", "transformers"), ("torch", "transformers", "peft")
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "tokens": TOKENS,
    "model": MODEL, "look": MODEL, "signals": MODEL, "score": MODEL, "vectors": MODEL, "losses": MODEL,
    "embeddings": (*MODEL, "sentence-transformers"),
    "evaluate": MODEL, "tasks": MODEL,
    "gradients": ADAPTER, "warmup": ADAPTER, "checkpoints": ADAPTER, "finetune": ADAPTER,
    **dict.fromkeys(("generated", "decompressed", "files", "parquet", "hub", "conversations", "texts", "words"), ()),
    **dict.fromkeys(("fingerprint", "alone", "similarity", "order", "density"), ()),
}  # fmt: skip


@cache
def version_of(package: str) -> str | None:
    """The installed version of a package, or of ``python``; None if it is not installed."""
    if package == "python":
        return python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    return {package: found for package in ("python", *packages) if (found := version_of(package)) is not None}


def key_versions(stage: str) -> dict[str, str]:
    """Package to ``major.minor``, of those packages that change what a stage computes."""
    return coarse_versions(LIBRARIES.get(stage, MODEL))


def coarse_versions(packages: Iterable[str]) -> dict[str, str]:
    """Package to ``major.minor``."""
    return {package: ".".join((version_of(package) or "none").split(".")[:2]) for package in packages}
