"""Every chat template of a folder against many shapes of conversation: is each scoped text the record's own?

    python benchmarks/chat_templates.py FOLDER

The folder holds ``*.jinja`` files, such as the ``chat_templates`` of the library trl. For each file and shape the
scoped tokens are decoded and looked for in the record, and the record's texts are looked for in the scoped tokens. A
template may refuse a shape or leave a part out: that is counted, as a run does, and is no fault.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trim_lightning.errors import UserError
from trim_lightning.records.record import Turn
from trim_lightning.tokens.rendering import RESPONSE, ChatRenderer, Encoded, RenderError

LOOK = [{"id": "call12345", "type": "function", "function": {"name": "look_up", "arguments": {"tree": "quercus"}}}]
TOOL = {"type": "object", "properties": {"tree": {"type": "string", "description": "Latin name"}}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Looks trees up", "parameters": TOOL}}]
ASK, SAY = Turn("user", "Which tree is it?"), Turn("assistant", "It is an oak.")
CALL = Turn("assistant", "", calls=json.dumps(LOOK))
RESULT = Turn("tool", "Oaks bear acorns.", name="look_up", call_id="call12345")
THINK = "<think>\nAcorns fell.\n</think>\n\nSurely an oak."
SHAPES: dict[str, tuple[Turn, ...]] = {
    "one exchange": (ASK, SAY),
    "system": (Turn("system", "You know trees."), ASK, SAY),
    "several turns": (ASK, SAY, Turn("user", "How old?"), Turn("assistant", "A century.")),
    "blanks and line breaks": (Turn("user", "  Which\n\ntree? "), Turn("assistant", "\tAn oak,\n\n  I think. ")),
    "two users": (Turn("user", "Hello."), ASK, SAY),
    "empty answer": (ASK, Turn("assistant", "")),
    "thought in the text": (ASK, Turn("assistant", THINK)),
    "thought without breaks": (ASK, Turn("assistant", "<think>Acorns fell.</think>Surely an oak.")),
    "thoughts in two turns": (ASK, Turn("assistant", THINK), Turn("user", "How old?"), Turn("assistant", THINK)),
    "thought apart": (ASK, Turn("assistant", "Surely an oak.", thought="Acorns fell.")),
    "call and result": (Turn("tools", json.dumps(TOOLS)), ASK, CALL, RESULT, SAY),
    "call with a text": (ASK, Turn("assistant", "Let me see.", calls=json.dumps(LOOK)), RESULT, SAY),
    "masked turn": (ASK, Turn("assistant", "A stone.", trained=False), Turn("user", "No."), SAY),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte, so that no token straddles a border."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>")


def faults(encoded: Encoded, turns: tuple[Turn, ...], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What is wrong with the scoped tokens of a record."""
    borders = np.flatnonzero(np.diff(encoded.roles)) + 1
    runs = [part for part in np.split(np.arange(len(encoded.roles)), borders) if len(part) and encoded.roles[part[0]]]
    texts = [(int(encoded.roles[run[0]]), str(tokenizer.decode(encoded.token_ids[run].tolist()))) for run in runs]
    found = [text for _, text in texts]
    answers = "\n".join(text for role, text in texts if role == RESPONSE)
    wrong = []
    for turn in turns:
        if turn.calls and turn.trained:
            named = all(part in answers for part in ("look_up", "tree", "quercus"))
            wrong += [] if named or "calls" in encoded.dropped else ["a call is missing"]
        pieces = [turn.thought, *turn.content.split("</think>")] if turn.role != "tools" else []
        for piece in (piece.replace("<think>", "").strip() for piece in pieces):
            dropped = "thoughts" in encoded.dropped and piece == "Acorns fell."
            if piece and (piece in "\n".join(found)) != turn.trained and not dropped:
                wrong.append(f"{piece!r} is {'missing' if turn.trained else 'scored'}")
    own = [piece for turn in turns for piece in (turn.content, turn.thought)]
    for role, text in texts:
        left = text
        for piece in sorted(own, key=len, reverse=True):  # two turns may stand side by side
            left = left.replace(piece.strip(), "") if piece.strip() else left
        if not left.strip() or any(text.strip() in piece for piece in own) or _of_call_or_tool(text, turns, role):
            continue
        wrong.append(f"{text!r} is not the record's own")
    return wrong


def _of_call_or_tool(text: str, turns: tuple[Turn, ...], role: int) -> bool:
    """True for what a template makes of calls (response) or of a tool (prompt)."""
    if role == RESPONSE:
        return any(turn.calls for turn in turns) and any(part in text for part in ("look_up", "quercus"))
    dumped = json.dumps(TOOLS)
    return any(turn.role == "tools" for turn in turns) and (text.strip() in dumped or "look_up" in text)


def main(folder: Path) -> int:
    """Print what each template does; 1 if a scoped text is not the record's own, or one is missing unsaid."""
    tokenizer, totals, bad = byte_tokenizer(), Counter[str](), 0
    for path in sorted(folder.glob("*.jinja")):
        try:
            renderer = ChatRenderer(tokenizer, path.read_text(encoding="utf-8"))
        except UserError as error:
            print(f"{path.name}: {error}")
            totals["templates refused"] += 1
            continue
        outcomes = renderer.encode(list(SHAPES.values()), 1 << 16)
        for name, turns, outcome in zip(SHAPES, SHAPES.values(), outcomes, strict=True):
            if isinstance(outcome, RenderError):
                totals["refused"] += 1
                print(f"{path.name}, {name}: {outcome}")
                continue
            totals["rendered"] += 1
            totals["with parts left out"] += bool(outcome.dropped)
            if outcome.dropped:
                print(f"{path.name}, {name}: leaves out {', '.join(outcome.dropped)}")
            for fault in faults(outcome, turns, tokenizer):
                bad += 1
                print(f"FAULT {path.name}, {name}: {fault}")
        totals["templates"] += 1
    print(f"{dict(totals)}, {bad} faults")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
