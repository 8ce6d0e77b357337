"""Every class that transformers calls causal, tiny and random: it computes what it does by itself, or is refused.

`make compatibility` writes docs/compatibility.md from the same look at every class.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from census.page import PUBLISHED_ONLY, page, take
from census.verify import Verdict, verify
from trim_lightning.models.reading import HOOK, NONE, WEIGHTS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
LEAST = 160  # of the causal classes select by their attention


@pytest.mark.parametrize(
    ("model_type", "way"),
    [
        ("gpt_oss", HOOK),
        ("qwen3_5", HOOK),
        ("mistral3", HOOK),
        ("falcon", WEIGHTS),
        ("dots3_note", WEIGHTS),
        ("zamba2", WEIGHTS),
        ("mamba2", NONE),
    ],
)
def test_a_class_of_each_kind_computes_what_it_does_by_itself(model_type: str, way: str, tmp_path: Path) -> None:
    verdict = verify(model_type, tmp_path)
    assert not verdict.refused
    assert not verdict.unbuilt
    assert verdict.reading is not None
    assert verdict.reading.way == way
    assert not verdict.wrong, verdict.differences


@pytest.mark.slow
def test_every_causal_class(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = take()
    causal = [verdict for verdict in verdicts if verdict.model_type not in PUBLISHED_ONLY]
    selecting = [verdict for verdict in causal if verdict.selects]
    with capsys.disabled():
        print(f"\n{len(selecting)} of {len(causal)} causal classes of transformers {transformers.__version__} select")
    wrong = {verdict.name: verdict.differences for verdict in verdicts if verdict.wrong}
    assert not wrong
    assert len(selecting) >= LEAST
    silent = [verdict.model_type for verdict in verdicts if not verdict.selects and not reason(verdict)]
    assert not silent
    if f"transformers {transformers.__version__}" in PAGE.read_text(encoding="utf-8"):
        assert PAGE.read_text(encoding="utf-8") == page(verdicts), "make compatibility writes the page anew"


def reason(verdict: Verdict) -> str:
    """Why a class does not select by its attention."""
    return verdict.refused or verdict.unbuilt or ("" if verdict.reading is None else verdict.reading.why)
