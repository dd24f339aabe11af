"""Run by two processes: a model that is spread over them gives what the whole one gives, be it by
its heads (tensor parallel) or by its weights (FSDP2).

torchrun --nproc_per_node 2 tests/support/two_processes.py FOLDER [FOLDER ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from captum_cw import (
    AttentionWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    TokenScores,
    VWAttention,
    VWONAttention,
    remove_tokens,
    remove_values,
    scale_values,
)
from captum_cw.capture import UnsupportedModelError

IDS = torch.arange(2, 26).reshape(2, 12)
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0)
MASK[0] = 1
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def results(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that the package says of a model, by name."""
    for kind in (AttentionWeights, VWAttention, VWONAttention, ContributionWeights):
        for number, layer in enumerate(kind(model).attribute(BATCH)):
            yield f"{kind.__name__} of layer {number}", layer
    contribution = ContributionWeights(model)
    yield "residual", torch.stack(ContributionWeights(model, space="residual").attribute(BATCH))
    yield "intra", torch.stack(ContributionWeights(model, scope="intra").attribute(BATCH))
    for name, part in contribution.decompose(BATCH)[-1]._asdict().items():
        yield f"decomposed: {name}", part
    yield "share of a head", contribution.head_share(BATCH)
    yield "scores", TokenScores(contribution, layers=None, heads=None).attribute(BATCH)
    masks = [
        torch.rand(layer.shape[:3]) < 0.3 for layer in AttentionWeights(model).attribute(BATCH)
    ]
    changes = {
        "values": remove_values(model, masks),
        "one value": scale_values(model, 0.5, positions=[0], layers=[1]),
        "online": remove_tokens(model, contribution, 0.3),
        "clean": remove_tokens(model, contribution, 0.3, scoring="clean"),
        "global": remove_tokens(model, contribution, 0.3, scoring="clean", ranking="global"),
    }
    yield "untouched", model(**BATCH).logits
    for name, change in changes.items():
        with change:
            yield f"logits with removal: {name}", model(**BATCH).logits
    metric = ComprehensivenessSufficiency(model, rates=[0.2, 0.5])
    found = metric.evaluate({"contribution": contribution, "random": "random"}, BATCH)
    yield "metric", torch.as_tensor(found.sufficiency["contribution"])


@torch.no_grad()
def main(folders: list[str]) -> int:
    dist.init_process_group("gloo")
    failed = 0
    for folder in folders:
        load = transformers.AutoModelForCausalLM.from_pretrained
        spread, sharded = load(folder, tp_plan="auto").eval(), load(folder).eval()
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        models = {"whole": load(folder).eval(), "heads": spread, "weights": sharded}
        found: dict[str, dict[str, Tensor]] = {}
        for how, model in models.items():
            torch.manual_seed(0)
            found[how] = dict(results(model))
            for name, a in found["whole"].items():
                gap = float((a - found[how][name]).abs().max() / a.abs().max())
                if not gap < 1e-4:
                    failed += 1
                    print(f"{Path(folder).name}, by {how}: {name} is off by {gap}")
        online = remove_tokens(spread, ContributionWeights(spread, space="residual"), 0.3)
        with pytest.raises(UnsupportedModelError, match="scoring='clean'"), online:
            spread(**BATCH)
        print(f"process {dist.get_rank()}: {Path(folder).name}: {len(found['heads'])} results")
    dist.destroy_process_group()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
