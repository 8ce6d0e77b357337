"""Token match: every candidate token meets the fingerprint of its own class, or the nearest one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trim_lightning.trim.fingerprints import FingerprintBank, unit

CHUNK = 8192  # vocabulary rows or tokens compared with all fingerprints at once


def nearest_classes(embeddings: Tensor, class_ids: Tensor, chunk: int = CHUNK) -> Tensor:
    """For each token class of the vocabulary, the place of the fingerprint class whose input embedding is nearest.

    Nearest is the highest cosine; ties go to the lowest token id (``class_ids`` ascend and argmax takes the
    first), also among the many unused classes of a vocabulary that share one embedding. A class with a
    fingerprint is its own nearest.

    Args:
        embeddings: ``[vocabulary, width]`` input embeddings.
        class_ids: ``[classes]`` int64 ids with a fingerprint, ascending.
        chunk: Vocabulary rows at once.

    Returns:
        ``[vocabulary]`` int64 places in ``class_ids``.
    """
    known = unit(embeddings[class_ids])
    # a matrix product may round equal columns differently, so equal embeddings are compared once
    _, kind = torch.unique(known, dim=0, return_inverse=True)
    order = torch.arange(len(class_ids), device=kind.device)
    first = torch.full_like(order, len(order)).scatter_reduce_(0, kind, order, "amin")
    first = first[first < len(order)].sort().values
    known = known[first]
    places = [
        (unit(embeddings[start : start + chunk]) @ known.T).argmax(-1) for start in range(0, embeddings.shape[0], chunk)
    ]
    table = first[torch.cat(places)]
    table[class_ids] = torch.arange(len(class_ids), device=table.device)
    return table


@dataclass(frozen=True)
class Matcher:
    """A bank prepared for matching against one model's vocabulary.

    Attributes:
        vectors: ``[classes, hidden]`` float32 fingerprints.
        class_ids: ``[classes]`` int64.
        table: ``[vocabulary]`` int64 place of the matched class, for direct matches and embedding fallback.
        known: ``[vocabulary]`` bool, True where the class has a fingerprint.
        nearest: ``embedding`` or ``hidden``.
    """

    vectors: Tensor
    class_ids: Tensor
    table: Tensor
    known: Tensor
    nearest: str

    @classmethod
    def prepare(cls, bank: FingerprintBank, embeddings: Tensor, nearest: str = "embedding") -> Matcher:
        """Move a bank to the device of ``embeddings`` ``[vocabulary, width]`` and compute its fallback table."""
        device = embeddings.device
        class_ids = bank.token_ids.to(device)
        known = torch.zeros(embeddings.shape[0], dtype=torch.bool, device=device)
        known[class_ids] = True
        table = nearest_classes(embeddings, class_ids)
        return cls(bank.vectors.to(device), class_ids, table, known, nearest)

    @property
    def classes(self) -> Tensor:
        """``[vocabulary]`` int64 ids of the classes that tokens meet, the embedding fallback among them."""
        return self.class_ids[self.table]

    def match(self, token_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine of each token with its matched fingerprint, before any fallback penalty.

        Args:
            token_ids: ``[tokens]`` int64.
            states: ``[tokens, hidden]`` float32, each last hidden state at unit length, made once for many banks.

        Returns:
            ``[tokens]`` float32 similarities and ``[tokens]`` int64 ids of the matched classes; the match is
            direct where the matched class is the token's own.
        """
        place = self.table[token_ids]
        if self.nearest == "hidden":
            missing = (~self.known[token_ids]).nonzero().squeeze(-1)
            for part in missing.split(CHUNK):
                place[part] = (states[part] @ self.vectors.T).argmax(-1)
        similarity = (states * self.vectors[place]).sum(-1)
        return similarity, self.class_ids[place]
