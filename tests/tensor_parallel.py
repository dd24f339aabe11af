"""Run by two processes: a model whose heads are spread over them is refused, not computed wrongly.

torchrun --nproc_per_node 2 tests/tensor_parallel.py FOLDER
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import transformers

from captum_cw import ContributionWeights
from captum_cw.capture import UnsupportedModelError


def main(folder: str) -> int:
    dist.init_process_group("gloo")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    try:
        ContributionWeights(model).attribute(torch.arange(2, 9)[None])
    except UnsupportedModelError as error:
        print(f"process {dist.get_rank()}: {error}")
        return 0
    finally:
        dist.destroy_process_group()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
