"""Which elements dropout keeps: Philox4x32 with 7 rounds, here in plain torch, the same in lora/triton_kernels.py.

Element (row, column) of a layer's input is decided by one 16-bit draw and is kept if draw >= round(p * 65536):

    words = philox(key = seed, counter = (column // 8, row, 0, 0))
    draw  = 16 bits of words[column % 8 // 2]: the low half for even columns, the high half for odd ones

So a mask is never stored. Eight decisions for one call of seven rounds: few enough instructions for a GPU to draw them
while it waits for memory.
Source: Salmon et al., 2011, doi:10.1145/2063384.2063405; seven rounds pass BigCrush.
"""

from dataclasses import dataclass

import torch

ROUNDS = 7
DRAWS = 65536  # values of a 16-bit draw
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_CHUNK = 1 << 16  # counters at a time: int64 words that stay in a CPU's cache


@dataclass(frozen=True)
class Dropout:
    """What decides a mask. `threshold` / 65536 is the probability of dropping an element."""

    threshold: int  # 1 to 65535
    seed: int  # 64 bits

    @property
    def keep_scale(self) -> float:
        """What kept elements are multiplied with, so that the expectation stays."""
        return DRAWS / (DRAWS - self.threshold)

    def keep(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """The mask, [rows, columns], bool; True where an element is kept."""
        mask = torch.empty(rows, columns, dtype=torch.bool, device=device)
        groups = torch.arange(-(-columns // 8), device=device)
        step = max(1, _CHUNK // max(1, len(groups)))
        for start in range(0, rows, step):
            numbers = torch.arange(start, min(rows, start + step), device=device)
            words = self._words(groups, numbers[:, None])
            draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
            mask[start : start + step] = (draws.flatten(1) >= self.threshold)[:, :columns]
        return mask

    def _words(self, group: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Philox in int64: the low 64 bits of a product are right whatever its sign becomes."""
        c0, c1, c2, c3 = group, row, torch.zeros_like(group), torch.zeros_like(group)
        key0, key1 = self.seed & _LOW, (self.seed >> 32) & _LOW
        for _ in range(ROUNDS):
            product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c1 = ((product2 >> 32) & _LOW) ^ c1 ^ key0, product2 & _LOW
            c2, c3 = ((product0 >> 32) & _LOW) ^ c3 ^ key1, product0 & _LOW
            key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
        return c0, c1, c2, c3


def dropout(p: float, seed: int | None) -> Dropout | None:
    """Dropout with probability p, rounded to a multiple of 1/65536 (off by 7.7e-6 at most); None where that is 0.

    Raises ValueError when p is not in [0, 1), or when a seed is missing or does not fit its bits.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p={p} is not in [0, 1).")
    threshold = round(p * DRAWS)
    if threshold == 0:
        return None
    if threshold == DRAWS:
        raise ValueError(f"dropout_p={p} rounds to 1 in 16 bits: it would drop everything; at most {1 - 1 / DRAWS}.")
    if seed is None:
        raise ValueError(f"dropout_p={p} needs a seed: the backward pass draws the mask again from it.")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} is not in [0, 2^64).")
    return Dropout(threshold, seed)
