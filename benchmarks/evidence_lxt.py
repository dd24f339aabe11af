"""Add the scores of LXT's AttnLRP to the rows of ``benchmarks/evidence.py``.

    pip install lxt==2.1 transformers==4.57.1     # in an environment of its own
    python benchmarks/evidence_lxt.py --model MODEL evidence/NAME

LXT replaces parts of the classes of transformers, and does not run with its newest releases. So
this script needs neither captum_cw nor its environment. ``evidence.py`` leaves the token ids of
its rows in a folder for each model. This script adds a file of scores for each set there, which
``evidence.py`` reads when it is started again. A run that was stopped resumes.

The score of a token is ``<x_j, g_j>``, with the gradient of LXT at the embedding ``x_j``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from lxt.efficient import monkey_patch
from tqdm import tqdm
from transformers import AutoModelForCausalLM


def load(name: str) -> Any:
    """Return a patched model, from a hub id, a folder or a .gguf file."""
    path = Path(name)
    place: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if path.suffix == ".gguf":
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    monkey_patch(sys.modules[type(model).__module__])
    return model.requires_grad_(False)


def explain(model: Any, question: dict[str, Any]) -> dict[str, Any]:
    """Return the target of a row, and the scores of its tokens."""
    x = model.get_input_embeddings()(torch.tensor([question["ids"]])).detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[0, -1]
    target = logits[question["good"]]
    if question["bad"] is not None:
        target = target - logits[question["bad"]]
    target.backward()
    return {"target": float(target), "scores": (x * x.grad).sum(-1)[0].tolist()}


def main() -> None:
    """Score the rows that have no scores yet."""
    parser = argparse.ArgumentParser(description="Add the scores of LXT to evidence.py's rows.")
    parser.add_argument("--model", required=True, help="a hub id, a folder or a .gguf file")
    parser.add_argument("work", type=Path, help="the folder of the model that evidence.py made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options.model)
    for file in sorted(options.work.glob("*.questions.json")):
        answers = file.with_name(file.name.replace(".questions.json", ".lxt.jsonl"))
        lines = answers.read_text("utf-8").splitlines() if answers.exists() else []
        done = {json.loads(line)["row"] for line in lines}
        with answers.open("a", encoding="utf-8") as out:
            for row, question in tqdm(json.loads(file.read_text("utf-8")).items(), file.stem):
                if int(row) not in done:
                    line = {"row": int(row), **explain(model, question)}
                    out.write(json.dumps(line) + "\n")
                    out.flush()


if __name__ == "__main__":
    main()
