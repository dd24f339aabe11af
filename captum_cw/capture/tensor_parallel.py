"""Layers whose heads are spread over processes (tensor parallel).

Each process runs some heads, and the layer's output is the sum of what they add to it. What is
handed over is the whole layer, in every process, so that no other room knows of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from captum_cw.functional import AttentionLayer, QueryMask, Weights

__all__ = ["HeadGroup", "head_group"]


@dataclass(frozen=True)
class HeadGroup:
    """The processes that run the heads of a layer, each as many, in the order of their ranks.

    Args:
        group: They.
        heads: How many query heads each runs.
    """

    group: dist.ProcessGroup
    heads: int

    @property
    def H(self) -> int:
        """How many query heads the layer has."""
        return self.heads * self.group.size()

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        """What all of them hold, one after the other along ``dim``."""
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for _ in range(self.group.size())
        ]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def part(self, x: Tensor) -> Tensor:
        """Of something ``(B, H|1, ...)``, what belongs to the heads of this process."""
        return x if x.shape[1] == 1 else x.narrow(1, self.group.rank() * self.heads, self.heads)

    def whole(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer, of the parts of it that each process holds."""
        y, w = self.gathered(layer.head_output, 1), self.gathered(layer.output_weight, 0)
        gate = None if layer.gate is None else self.gathered(layer.gate, 1)
        given = y if gate is None else y * gate
        return replace(
            layer,
            weights=self._weights(layer.weights),
            value=self.gathered(layer.value, 1),
            head_output=y,
            output_weight=w,
            # Not a sum of what each has: the model may have added them up in place by now.
            output=given.transpose(1, 2).flatten(2) @ w.flatten(0, 1),
            mask=self._mask(layer.mask),
            gate=gate,
        )

    def _weights(self, weights: Weights) -> Weights:
        return lambda rows: self.gathered(weights(rows), 1)

    def _mask(self, mask: QueryMask) -> QueryMask:
        seen = mask.visible
        if seen is None or seen.shape[1] == 1:
            return mask
        return replace(mask, visible=self.gathered(seen, 1))


def head_group(module: nn.Module, heads: int, d_h: int) -> HeadGroup | None:
    """Which processes run the heads of an attention module; None where this one runs them all.

    The output projection tells: its weight lies in shards of its input features, of which this
    process has ``heads * d_h``.

    Args:
        module: The attention module, before its output projection runs.
        heads: How many query heads this process runs.
        d_h: Features of each.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    from torch.distributed.tensor import DTensor, Shard

    for weight in module.parameters():
        if not isinstance(weight, DTensor) or weight.dim() != 2:
            continue
        for dim, placement in enumerate(weight.placements):
            group = weight.device_mesh.get_group(dim)
            whole = weight.shape[1] == heads * d_h * group.size()
            if placement == Shard(1) and whole and group.size() > 1:
                return HeadGroup(group, heads)
    return None
