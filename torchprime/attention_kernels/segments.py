"""The segments of a batch as the kernels read them, in torch; jax is not needed for it."""

from __future__ import annotations

import torch
from torch import Tensor


def with_first_positions(segment_ids: Tensor) -> Tensor:
    """Return int32 [B, 2, S] for segment_ids [B, S]: the ids, and for each position the first one
    with its id."""
    length = segment_ids.shape[1]
    place = torch.arange(length, device=segment_ids.device, dtype=torch.int32)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    first = torch.where(same, place, length).amin(dim=-1)
    return torch.stack([segment_ids.int(), first.int()], dim=1)
