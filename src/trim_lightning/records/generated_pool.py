"""The built-in pool: records of reasoning-gym's task families, made on the spot.

Which families are in, and the form of a record, are our choice. Left out are families that are slow to
generate, have no answer text, have very long questions, or differ between processes for one seed (their
output hangs on the hash seed, on the global random state, or on today's date).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trim_lightning.errors import UserError, suggest

# Raise it whenever the same arguments give another file.
SCHEMA = 1

FAMILIES: tuple[str, ...] = (
    "ab",
    "acre",
    "advanced_geometry",
    "aiw",
    "arc_1d",
    "base_conversion",
    "basic_arithmetic",
    "bf",
    "binary_alternation",
    "binary_matrix",
    "bitwise_arithmetic",
    "caesar_cipher",
    "calendar_arithmetic",
    "chain_sum",
    "circuit_logic",
    "coin_flip",
    "color_cube_rotation",
    "complex_arithmetic",
    "count_bits",
    "count_primes",
    "countdown",
    "course_schedule",
    "cryptarithm",
    "decimal_arithmetic",
    "decimal_chain_sum",
    "dice",
    "emoji_mystery",
    "family_relationships",
    "figlet_font",
    "fraction_simplification",
    "game_of_life",
    "game_of_life_halting",
    "gcd",
    "group_anagrams",
    "gsm_symbolic",
    "jugs",
    "kakurasu",
    "knights_knaves",
    "largest_island",
    "lcm",
    "leg_counting",
    "letter_counting",
    "letter_jumble",
    "mahjong_puzzle",
    "manipulate_matrix",
    "maze",
    "mini_sudoku",
    "modulo_grid",
    "n_queens",
    "needle_haystack",
    "number_filtering",
    "number_format",
    "number_sequence",
    "number_sorting",
    "palindrome_generation",
    "palindrome_partitioning",
    "path_star",
    "polynomial_equations",
    "pool_matrix",
    "power_function",
    "prime_factorization",
    "products",
    "rearc",
    "rotate_matrix",
    "rotten_oranges",
    "self_reference",
    "sentence_reordering",
    "shortest_path",
    "simple_equations",
    "simple_geometry",
    "simple_integration",
    "spell_backward",
    "spiral_matrix",
    "string_insertion",
    "string_manipulation",
    "string_splitting",
    "string_synthesis",
    "sudoku",
    "survo",
    "syllogism",
    "tower_of_hanoi",
    "tsumego",
    "word_sequence_reversal",
    "word_sorting",
)

_FINAL_MARK = re.compile(r"\s*####[^\n]*\s*\Z")


def key(families: Sequence[str], per_family: int, seed: int) -> dict[str, object]:
    """Everything that determines the generated file, for cache keys."""
    return {
        "families": list(families),
        "per_family": per_family,
        "seed": seed,
        "reasoning_gym": importlib.metadata.version("reasoning-gym"),
        "schema": SCHEMA,
    }


def check_families(families: Sequence[str] | None, what: str) -> tuple[str, ...]:
    """The families to generate, without repetitions; null means all.

    Raises:
        UserError: if one is unknown, or the list is empty.
    """
    if families is None:
        return FAMILIES
    if not families:
        raise UserError(f"{what}.families is empty: name at least one family, or null for all")
    for name in families:
        if name not in FAMILIES:
            raise UserError(f"{what}.families: there is no family {name}{suggest(name, FAMILIES)}")
    return tuple(dict.fromkeys(families))


def generate(path: Path, families: Sequence[str], per_family: int, seed: int) -> None:
    """Write ``len(families) * per_family`` records as JSON lines, the families interleaved.

    Item 0 of every family comes first, then item 1 of every family. Each line has ``id``, ``prompt``,
    ``response`` (the answer, after the reasoning where the family gives one), ``answer``, ``family`` and,
    where it survives JSON, ``entry``: the metadata that reasoning-gym's ``score_answer`` needs beside the
    question (``prompt``) and the answer.

    Args:
        path: The file to write.
        families: Names from `FAMILIES`.
        per_family: Records of each family.
        seed: Two seeds share no items, save where a family has few distinct ones.
    """
    with _quiet(), path.open("w", encoding="utf-8", newline="\n") as out:
        import reasoning_gym

        datasets = {
            name: reasoning_gym.create_dataset(name, size=per_family, seed=_family_seed(name, seed))
            for name in families
        }
        for place in range(per_family):
            for name, dataset in datasets.items():
                out.write(json.dumps(_record(name, place, dataset), ensure_ascii=False) + "\n")


def _family_seed(name: str, seed: int) -> int:
    # A family seeds item i with seed + i, so that plain neighbouring seeds would share nearly all items.
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def _record(name: str, place: int, dataset: Any) -> dict[str, Any]:
    item = dataset[place]
    answer, metadata = str(item["answer"]), item["metadata"]
    record = {
        "id": f"{name}-{place}",
        "prompt": str(item["question"]),
        "response": with_reasoning(metadata.get("answer_cot"), answer),
        "answer": answer,
        "family": name,
    }
    entry = _entry(dataset, item)
    return record if entry is None else {**record, "entry": entry}


def _entry(dataset: Any, item: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metadata as JSON gives it back, or None where the family cannot score an answer with that."""
    try:
        metadata: dict[str, Any] = json.loads(json.dumps(item["metadata"], allow_nan=False))
        # Lists are not tuples: some families then find the right answer wrong.
        score = dataset.score_answer(item["answer"], {**item, "metadata": metadata})
        return metadata if score == dataset.score_answer(item["answer"], item) else None
    except Exception:  # a family may fail in its own way on metadata that has been through JSON
        return None


def with_reasoning(reasoning: str | None, answer: str) -> str:
    """The response: the reasoning and a last line ``The answer is X.``, or the bare answer without reasoning.

    A final ``#### X``, which says the same in another form, is replaced.
    """
    if not reasoning:
        return answer
    conclusion, body = f"The answer is {answer}.", _FINAL_MARK.sub("", reasoning).rstrip()
    if body.endswith(conclusion):
        return body
    return f"{body}\n{conclusion}" if body else conclusion


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the generators from printing and from moving the global random states."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
