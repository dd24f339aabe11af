"""Attention layers whose heads are sharded over processes (tensor parallelism).

Each process runs some of the heads, and the layer's output is the sum over all processes. This
module gathers the whole layer in every process, so that the rest of the package needs no special
case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from captum_cw.functional import AttentionLayer

__all__ = ["HeadGroup", "head_group"]


@dataclass(frozen=True)
class HeadGroup:
    """The processes that share the heads of a layer equally, in the order of their ranks.

    Args:
        group: The process group that shards the heads.
        heads: The number of query heads of each process.
    """

    group: dist.ProcessGroup
    heads: int

    @property
    def H(self) -> int:
        """The number of query heads of the whole layer."""
        return self.heads * self.group.size()

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        """Concatenate the tensors of all processes along ``dim``."""
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for _ in range(self.group.size())
        ]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def part(self, x: Tensor) -> Tensor:
        """Return the part of ``x`` ``(B, H|1, ...)`` for the heads of this process."""
        return x if x.shape[1] == 1 else x.narrow(1, self.group.rank() * self.heads, self.heads)

    def whole(self, layer: AttentionLayer) -> AttentionLayer:
        """Gather the whole layer from the parts of all processes."""
        y, w = self.gathered(layer.head_output, 1), self.gathered(layer.output_weight, 0)
        gate = None if layer.gate is None else self.gathered(layer.gate, 1)
        given = y if gate is None else y * gate
        mask = layer.mask
        if mask.visible is not None and mask.visible.shape[1] > 1:
            mask = replace(mask, visible=self.gathered(mask.visible, 1))
        return replace(
            layer,
            weights=lambda rows: self.gathered(layer.weights(rows), 1),
            value=self.gathered(layer.value, 1),
            head_output=y,
            output_weight=w,
            # Recomputed, since the model may already have summed the outputs in place.
            output=given.transpose(1, 2).flatten(2) @ w.flatten(0, 1),
            mask=mask,
            gate=gate,
        )


def head_group(module: nn.Module, heads: int, d_h: int) -> HeadGroup | None:
    """Return the processes that share the heads of an attention module; None if only this one.

    They are found by the weight of the output projection. It is sharded over its input features, of
    which this process has ``heads * d_h``.

    Args:
        module: The attention module, before its output projection runs.
        heads: The number of query heads of this process.
        d_h: The size of each head.
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
