"""The block sizes of the Triton kernels, and what follows from them and from the shape of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Block sizes of a launch: features of a tile, rows at a time, warps, and how float32 products are made."""

    block: int
    block_n: int
    warps: int
    precision: str


# (largest N, largest D) -> Config; the first row that fits. Chosen from the compiled code (python -m tools.aot: no
# spills, 128-bit accesses) and not yet tuned on a GPU; `python -m tools.tune` measures candidates and prints it.
_ANY = 1 << 62
TABLE: tuple[tuple[int, int, Config], ...] = (
    (16, 512, Config(32, 16, 2, "ieee")),
    (16, _ANY, Config(64, 16, 4, "ieee")),
    (_ANY, 512, Config(32, 32, 4, "ieee")),
    (_ANY, _ANY, Config(64, 32, 8, "ieee")),
)


@dataclass(frozen=True)
class Settings:
    """What decides how a function is launched."""

    table: tuple[tuple[int, int, Config], ...] = TABLE
    one_pass_rows: int = 128  # up to here a program sums the columns of its own panels, which saves a launch
    fused_features: int = 2048  # up to here every program of `finish` adds up all features itself, which saves a launch
    chunk_elements: int = 16384  # of the sums that it adds at a time

    def config_for(self, N: int, D: int) -> Config:
        """The first row of the table that fits."""
        for most_n, most_d, config in self.table:
            if most_n >= N and most_d >= D:
                return config
        raise AssertionError("the last row takes any shape")


FEATURE_ROWS = 8  # of the workspace
_MAX_CHUNKS = 64  # row chunks of a column sum


class Plan:
    """Tiles, grids and size of the workspace of a call."""

    def __init__(self, N: int, D: int, settings: Settings) -> None:
        self.config = settings.config_for(N, D)
        block, block_n = self.config.block, self.config.block_n
        tiles = -(-D // block)
        self.width = tiles * block
        self.sizes = {"D": D, "T": tiles, "WIDTH": self.width, "BLOCK": block}
        self.tiles_pow2 = max(2, 1 << (tiles - 1).bit_length())
        self.features_per_pass = max(16, settings.chunk_elements // self.tiles_pow2)
        self.fused, self.summed = settings.fused_features >= D, settings.one_pass_rows < N
        # Rows in at most _MAX_CHUNKS chunks of whole blocks.
        self.rows_per_chunk = -(-N // (_MAX_CHUNKS * block_n)) * block_n
        self.chunks = -(-N // self.rows_per_chunk) if N else 0
        self.grid, self.pairs, self.chunk_grid = (tiles,), ((tiles + 1) // 2, tiles + 1), (tiles, self.chunks)
        self.block_grid = (max(1, -(-N // block_n)), tiles)
        # partial, features and energies; sums and products are only there where a function has them.
        self.rows = tiles + FEATURE_ROWS + 1

    def workspace(self, like: Tensor, chunk_rows: int = 0) -> Tensor:
        """The float32 workspace that `blocks` describes, with so many rows for each chunk."""
        size = (self.rows + chunk_rows * self.chunks) * self.width
        return torch.empty(size, dtype=torch.float32, device=like.device)
