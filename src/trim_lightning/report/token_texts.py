"""The text that each token of a sequence shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a decoder writes for part of a character
MOST_TOKENS_OF_A_CHARACTER = 12


class TokenTexts:
    """Writes token ids as text, token by token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._single: dict[int, str] = {}

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """One text for each token; together they are the text of the sequence.

        A character that is spread over several tokens stands at the first of them, and the others get ``""``.
        """
        ids = [int(token) for token in token_ids]
        singles = [self._alone(token) for token in ids]
        if not any(BROKEN in text for text in singles) and "".join(singles) == self._decode(ids):
            return singles
        return self._pieces_in_context(ids)

    def name(self, token_id: int) -> str:
        """A token class by its text; by its entry in the vocabulary if it is only part of a character."""
        text = self._alone(int(token_id))
        if text and BROKEN not in text:
            return text
        return self._tokenizer.id_to_token(int(token_id)) or f"#{token_id}"

    def _pieces_in_context(self, ids: list[int]) -> list[str]:
        # decoders join and strip at the start of what they are given, so each token is read after the one before
        result: list[str] = []
        before = begin = 0
        for place in range(len(ids)):
            known, text = self._decode(ids[before:begin]), self._decode(ids[before : place + 1])
            pending = place + 1 - begin
            if text.endswith(BROKEN) and place + 1 < len(ids) and pending < MOST_TOKENS_OF_A_CHARACTER:
                continue
            result += [text[len(known) :], *[""] * (pending - 1)]
            before, begin = begin, place + 1
        return result

    def _alone(self, token: int) -> str:
        text = self._single.get(token)
        if text is None:
            text = self._single[token] = self._decode([token])
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def texts_of(model: Path, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> TokenTexts:
    """The texts of a model's tokens: those of its own file if it has one, for transformers takes long to import."""
    file = model / "tokenizer.json"
    return read_token_texts(file) if file.is_file() else TokenTexts(tokenizer().backend_tokenizer)


@lru_cache(maxsize=2)
def read_token_texts(file: Path) -> TokenTexts:
    """The texts of a ``tokenizer.json``, read once for all jobs of a process; needs neither torch nor transformers."""
    from tokenizers import Tokenizer

    return TokenTexts(Tokenizer.from_file(str(file)))
