"""Responses without their prompts, token by token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from trim_lightning.console.progress import progress_bar
from trim_lightning.tokens.spans import PROMPT, RESPONSE, SCAFFOLD
from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence

BATCH = 512  # records between two updates of the progress bar


def without_prompt(sequence: TokenSequence, boundary: int) -> TokenSequence:
    """Take the prompt's content out of a record; scaffolding and response stay (our choice).

    The same response tokens are predicted as in the whole record: where nothing would stand before the first
    one any more, ``boundary`` is put there.

    Args:
        sequence: The record.
        boundary: Id of a token that begins a text.

    Returns:
        The rest; no tokens if there is no response.
    """
    kept = sequence.roles != PROMPT
    token_ids, roles = sequence.token_ids[kept], sequence.roles[kept]
    if not (roles == RESPONSE).any():
        return TokenSequence(token_ids[:0], roles[:0])
    if roles[0] == RESPONSE and not kept[0]:
        token_ids = np.concatenate([np.array([boundary], token_ids.dtype), token_ids])
        roles = np.concatenate([np.array([SCAFFOLD], roles.dtype), roles])
    return TokenSequence(token_ids, roles)


def write_without_prompts(records: TokenizedRecords, directory: Path, boundary: int) -> None:
    """Write every record `without_prompt` in the form that `TokenizedRecords` opens.

    Args:
        records: The tokenised records.
        directory: Where the files go.
        boundary: See `without_prompt`.
    """
    offsets = np.zeros(len(records) + 1, dtype=np.int64)
    with (
        (directory / "token_ids.int32").open("wb") as ids_file,
        (directory / "roles.uint8").open("wb") as roles_file,
        progress_bar("prepare", len(records), unit="records") as bar,
    ):
        for row in range(len(records)):
            token_ids, roles = without_prompt(records[row], boundary)
            ids_file.write(token_ids.tobytes())
            roles_file.write(roles.tobytes())
            offsets[row + 1] = offsets[row] + len(token_ids)
            if row % BATCH == BATCH - 1:
                bar.update(BATCH)
        bar.update(len(records) % BATCH)
    offsets.tofile(directory / "offsets.int64")
    summary = {"truncated": records.truncated, "unrendered": records.unrendered, "problems": records.problems}
    (directory / "summary.json").write_text(json.dumps(summary))
