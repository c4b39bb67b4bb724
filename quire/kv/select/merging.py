"""Entries become one: the weighted means that merging methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts


def merged(
    facts: Facts,
    layer: int,
    entries: Entries,
    label: Tensor,
    weight: Tensor,
    lead: Tensor,
    *,
    unrotate: bool = False,
) -> Entries:
    """One entry for each group of ``entries`` (all of them valid): means of keys and of values.

    ``label`` int64 ``[kv_heads, n]``: the group that an entry joins. ``weight`` ``[kv_heads, n]``;
    an entry of weight 0 is dropped. ``lead`` int64 ``[kv_heads, groups]``: the member of each group
    whose position it takes. ``unrotate``: keys are averaged without RoPE, which is then applied at
    that position; means of rotated keys lose what turns fast between the members' positions.
    """
    positions = entries.positions.gather(1, lead)
    weight = weight.float()
    total = torch.zeros(lead.shape).scatter_add_(1, label, weight).clamp(min=1e-30)[..., None]

    def mean(x: Tensor) -> Tensor:
        spread = label[..., None].expand_as(x)
        sums = x.new_zeros(*lead.shape, x.shape[-1])
        return sums.scatter_add_(1, spread, x * weight[..., None]) / total

    keys = entries.keys.float()
    if unrotate:
        keys = mean(facts.unrotate(layer, keys, entries.positions))
        keys = facts.rotate(layer, keys, positions)
    else:
        keys = mean(keys)
    dtype = entries.keys.dtype
    return Entries(keys.to(dtype), mean(entries.values.float()).to(dtype), positions)
