"""top-k, top-p (nucleus: Holtzman et al., 2020) and min-p (Nguyen et al., 2024), on probabilities sorted downwards."""

from __future__ import annotations

import torch


def keep_mask(
    probabilities: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Which entries stay. `probabilities` (rows, vocabulary) is sorted downwards, the limits are (rows, 1).

    top-p acts on what top-k leaves, renormalised, and keeps the token that crosses the limit. The likeliest token
    always stays.
    """
    rank = torch.arange(probabilities.shape[1], device=probabilities.device)
    keep = rank < top_k
    left = probabilities * keep
    before = left.cumsum(dim=-1) - left
    keep &= before < top_p * left.sum(dim=-1, keepdim=True)
    keep &= probabilities >= min_p * probabilities[:, :1]
    keep[:, 0] = True
    return keep
