"""Shards of the scoring pass: how near every scoped token of the pool is to its fingerprint, in every bank.

What banks share is not written: ids and scope are in the tokenised pool, and the class that a token is matched with
follows from its own by a table, unless ``fallback.nearest=hidden`` asks each token anew. Up to three banks keep
float32, more get 16 bits each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.engine.shards import ShardForm, finished_values, is_intact, rows_of, write_tensors
from trim_lightning.tokens.tokenized import predicted_responses, scope_mask

if TYPE_CHECKING:  # results are read without torch
    from torch import Tensor

    from trim_lightning.engine.batches import Shard

EXACT_BANKS = 3  # in float32 they take no more than 6 bytes a token and 2 a bank
SCALE = 32_767  # the code of a cosine of 1
NO_VALUE = -32_768  # the code of NaN
MATCHES, ROWS = "matches.safetensors", "rows.safetensors"  # ROWS: those that a pass over a part of the pool was over


def codes_of(similarity: Tensor) -> Tensor:
    """Cosines as whole numbers of 16 bits, in steps of 1/32,767 (our choice).

    float16 takes as much room, and its steps are 16 times as wide where cosines are high.
    """
    import torch

    codes = (similarity.clamp(-1, 1) * SCALE).round()
    return torch.where(codes.isnan(), NO_VALUE, codes).to(torch.int16)


def cosines_of(stored: NDArray[Any]) -> NDArray[np.float64]:
    """The cosines that a shard holds, as float32 or as `codes_of` them; NaN among them."""
    if stored.dtype != np.int16:
        return stored.astype(np.float64)
    cosines: NDArray[np.float64] = stored / np.float64(SCALE)
    cosines[stored == NO_VALUE] = np.nan
    return cosines


def bytes_of(banks: int) -> int:
    """Bytes that a shard holds of a token's similarities."""
    return banks * (4 if banks <= EXACT_BANKS else 2)


def similarity_path(directory: Path, index: int) -> Path:
    """File of shard ``index``.

    Tensors ``rows [records]`` int64; of their scoped tokens, record after record, ``similarity [banks, tokens]`` (raw
    cosines, see `cosines_of`); with ``nearest=hidden`` ``match [banks, tokens]`` int32, the matched classes' ids; where
    errors are wanted ``error [tokens]`` float16, the model's 1 - p of each token.

    Where targets are given, of each response ``responses [records]`` int32 (its tokens) and ``mean_alignment [banks,
    records]`` float32, NaN without a token; unless prompts alone are scoped, ``alignment [banks, tokens]`` float32 of
    the scoped tokens; and where states are wanted, ``mean_state [records, hidden]`` float16.
    """
    return directory / f"similarity-{index:06d}.safetensors"


class TokenShards(ShardForm):
    """Token similarities of a shard as one file; see `similarity_path`.

    Args:
        directory: Where the files go.
        banks: Number of banks.
        scope: Content tokens that count.
        nearest: ``fallback.nearest``; with ``embedding`` the pass itself writes the table of matches, as `MATCHES`.
        first: Place of the first bank among those of the pass.
        errors: Keep the model's error at each token.
        targets: Places of the banks' targets among those of the pass; empty if nothing is kept of responses.
        states: Keep the mean state of each response too.
    """

    def __init__(
        self,
        directory: Path,
        banks: int,
        scope: str,
        nearest: str,
        first: int = 0,
        errors: bool = False,
        targets: Sequence[int] = (),
        states: bool = False,
    ) -> None:
        self.directory, self.scope, self.nearest, self.errors = directory, scope, nearest, errors
        self.banks = range(first, first + banks)
        self.targets, self.states = list(targets), states

    @property
    def has_table(self) -> bool:
        """True if one table says what every token of a class is matched with."""
        return self.nearest == "embedding"

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        done = finished_values(self.directory, rows_of(plan), similarity_path)
        return done if not self.has_table or is_intact(self.directory / MATCHES) else set()

    def is_there(self, index: int) -> bool:
        return similarity_path(self.directory, index).exists()

    def write(self, index: int, parts: Sequence[tuple[Tensor, Any]]) -> None:
        import torch

        results = [prediction for _, prediction in parts]
        scope = torch.from_numpy(scope_mask(joined(results, "roles").numpy(), self.scope))
        similarity = torch.cat([result["similarity"][self.banks.start : self.banks.stop] for result in results], dim=-1)
        scoped = similarity.float().cpu()[:, scope]
        kept = scoped if len(self.banks) <= EXACT_BANKS else codes_of(scoped)
        tensors = {"rows": joined(results, "rows"), "similarity": kept}
        if not self.has_table:
            tensors["match"] = torch.stack([joined(results, f"match/{bank}")[scope].int() for bank in self.banks])
        if self.errors:
            tensors["error"] = joined(results, f"error/{self.scope}")[scope]
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        if self.targets:
            arrays |= self._of_responses(results, scope.numpy())
        write_tensors(similarity_path(self.directory, index), arrays)

    def _of_responses(
        self, results: Sequence[Mapping[str, Tensor]], scope: NDArray[np.bool_]
    ) -> dict[str, NDArray[Any]]:
        """What is kept of each response, see `similarity_path`."""
        import torch

        lengths = joined(results, "lengths").numpy()
        counted = predicted_responses(joined(results, "roles").numpy(), lengths)
        alignment = torch.cat([result["alignment"] for result in results], dim=1).cpu().numpy()[self.targets]
        starts = np.cumsum(lengths) - lengths
        responses = np.add.reduceat(counted.astype(np.int32), starts)
        sums = np.add.reduceat(alignment.astype(np.float64), starts, axis=1)
        means = sums / np.where(responses > 0, responses, np.nan)
        kept: dict[str, NDArray[Any]] = {"responses": responses, "mean_alignment": means.astype(np.float32)}
        if self.scope != "prompt":
            kept["alignment"] = alignment[:, scope]
        if self.states:
            states = torch.cat([result["mean_state"] for result in results], dim=1)
            kept["mean_state"] = states.T.contiguous().cpu().numpy()
        return kept


def joined(results: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """One result of all batches of a shard."""
    import torch

    return torch.cat([result[name] for result in results]).cpu()


class SharedShards(ShardForm):
    """One pass that serves several readers: each gets the files that a pass of its own would have written."""

    def __init__(self, readers: Sequence[TokenShards]) -> None:
        self.readers = list(readers)

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        return set.intersection(*(reader.finished(plan) for reader in self.readers))

    def is_there(self, index: int) -> bool:
        return all(reader.is_there(index) for reader in self.readers)

    def write(self, index: int, parts: Sequence[tuple[Tensor, Any]]) -> None:
        parts = [(rows, {name: value.cpu() for name, value in prediction.items()}) for rows, prediction in parts]
        for reader in self.readers:
            reader.write(index, parts)
