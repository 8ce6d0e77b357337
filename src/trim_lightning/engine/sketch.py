"""Random projection of very long vectors: a seeded count sketch with signs and shifts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class CountSketch:
    """Projects vectors that come in parts to ``dimension`` numbers whose inner products estimate the vectors' own.

    A part is cut into blocks of ``dimension`` coordinates; each coordinate gets a random sign, each block is rotated
    by a random shift, and all blocks are added up. Two coordinates of different blocks meet with probability
    1/dimension and those of one block never, so the estimate of an inner product is unbiased and its variance is at
    most that of a dense matrix of random signs (scaled by 1/sqrt(dimension)), ‖x‖²‖y‖²/dimension and less. It takes
    one pass over the vector where the dense matrix takes ``dimension``, and no matrix has to be made. Sums run in a
    fixed order, so that the same vectors give the same bits on the same device.

    A count sketch in place of a dense Rademacher projection is our choice, likewise the shifts in place of a free
    place for every coordinate.

    Args:
        sizes: Coordinates of each part.
        dimension: Numbers that are left.
        seed: Of signs and shifts, which are drawn on the CPU whatever the device.
        device: Where vectors are.
    """

    def __init__(self, sizes: Sequence[int], dimension: int, seed: int, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dimension = dimension
        self._signs: list[Tensor] = []
        self._shifts: list[list[int]] = []
        for size in sizes:
            signs = torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
            self._signs.append(signs.to(device))
            blocks = -(-size // dimension)
            self._shifts.append(torch.randint(dimension, (blocks,), generator=generator).tolist())

    def add(self, part: int, vectors: Tensor, into: Tensor) -> None:
        """Add the sketch of one part.

        Args:
            part: Its place in ``sizes``.
            vectors: ``[batch, size]``; overwritten.
            into: ``[batch, dimension]``, changed in place.
        """
        signed = vectors.mul_(self._signs[part])
        for block, shift in enumerate(self._shifts[part]):
            piece = signed[:, block * self.dimension : (block + 1) * self.dimension]
            width = piece.shape[1]
            head = min(width, self.dimension - shift)
            into[:, shift : shift + head] += piece[:, :head]
            if head < width:
                into[:, : width - head] += piece[:, head:]
