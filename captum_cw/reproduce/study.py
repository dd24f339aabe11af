"""A study: one model on one set of texts, and the plan of its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from captum_cw._utils.versions import versions
from captum_cw.capture.model import device_of
from captum_cw.data import token_batches
from captum_cw.metrics.identity import checksum, fingerprint


@dataclass(frozen=True)
class Plan:
    """The size of a run: how many texts, how long, and which rates.

    Args:
        name: The name of the plan.
        texts: The number of texts for the analyses.
        length: The maximum number of tokens of each text.
        correlations: Texts and tokens for the correlation of components.
        scaling: Texts and tokens for the scaling of the first token's value.
        removal: Texts and tokens for comprehensiveness and sufficiency.
        top: The fractions to remove from the top.
        bottom: The fractions to remove from the bottom.
        points: The size of the sample of a regression.
        documents: The number of documents of each downstream task.
        skip: How many texts to skip at the start, so that claims can be judged on unseen texts.
        batch_size: The number of texts in a pass of the removal metric.
        seed: Random seed.
    """

    name: str
    texts: int
    length: int
    correlations: tuple[int, int]
    scaling: tuple[int, int]
    removal: tuple[int, int]
    top: tuple[float, ...]
    bottom: tuple[float, ...]
    points: int
    documents: int
    skip: int = 0
    batch_size: int = 8
    seed: int = 0

    @property
    def needed(self) -> int:
        """The number of texts that the plan reads."""
        return self.skip + max(pair[0] for pair in self.pairs)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Texts and tokens of each part of the run."""
        return (self.texts, self.length), self.correlations, self.scaling, self.removal

    def resized(self, texts: int | None, length: int | None, documents: int | None = None) -> Plan:
        """Return a plan with at most this many texts, tokens and documents."""

        def smaller(pair: tuple[int, int]) -> tuple[int, int]:
            return min(pair[0], texts or pair[0]), min(pair[1], length or pair[1])

        (count, longest), *others = map(smaller, self.pairs)
        names = ("correlations", "scaling", "removal")
        parts: dict[str, Any] = dict(zip(names, others, strict=True))
        documents = min(self.documents, documents or self.documents)
        return replace(self, texts=count, length=longest, documents=documents, **parts)


QUICK = Plan("quick", 6, 96, (6, 96), (6, 96), (6, 64), (0.01, 0.1), (0.3, 0.7), 200_000, 50)
FULL = Plan(
    name="full",
    texts=32,
    length=512,
    correlations=(32, 128),
    scaling=(32, 512),
    removal=(32, 512),
    top=(0.01, 0.02, 0.05, 0.1, 0.2),
    bottom=(0.1, 0.3, 0.5, 0.7, 0.9),
    points=1_000_000,
    documents=500,
)
#: The sizes of arXiv 2606.07604, where the paper states them.
PAPER = replace(
    FULL,
    name="paper",
    scaling=(128, 1024),
    removal=(64, 512),
    bottom=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    points=5_000_000,
    documents=2000,
)
PLANS = {plan.name: plan for plan in (QUICK, FULL, PAPER)}

PAPER_MODELS = (
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.2-1B",
    "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen3-8B",
    "deepseek-ai/deepseek-llm-7b-base",
)
PAPER_TASKS = ("mmlu", "boolq", "lambada_openai", "winogrande")
PAPER_DATA = ("fineweb-edu", "gsm8k")


@dataclass(frozen=True)
class Study:
    """A model and texts for it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: The texts, as many as the plan needs.
        model_name: The name of the model.
        data_name: The name of the texts.
        plan: The size of the run.
        tasks: Downstream tasks, by their names in lm-evaluation-harness.
        task_path: A folder with your own task files.
    """

    model: nn.Module
    tokenizer: Any
    texts: Sequence[str]
    model_name: str
    data_name: str
    plan: Plan
    tasks: Sequence[str] = ()
    task_path: Path | None = None

    def batches(self, texts: int, length: int, batch_size: int = 1) -> list[dict[str, Tensor]]:
        """Return batches of the first texts after the skipped ones, cut to ``length`` tokens.

        Raises:
            ValueError: If all texts are skipped.
        """
        skip = self.plan.skip
        if skip >= len(self.texts):
            raise ValueError(
                f"{self.data_name} has {len(self.texts)} texts, of which {skip} are skipped: skip "
                "fewer."
            )
        device = device_of(self.model)
        batches = token_batches(
            self.texts[skip:],
            self.tokenizer,
            max_length=length,
            num_examples=texts,
            batch_size=batch_size,
        )
        return [{name: x.to(device) for name, x in batch.items()} for batch in batches]

    @cached_property
    def analysed(self) -> list[dict[str, Tensor]]:
        """The texts of most analyses, one per batch."""
        return self.batches(self.plan.texts, self.plan.length)

    def identity(self) -> Mapping[str, Any]:
        """Return what must be equal for results to belong to the same run."""
        return {
            "weights": fingerprint(self.model),
            "texts": checksum(
                *(batch["input_ids"] for pair in self.plan.pairs for batch in self.batches(*pair))
            ),
            "plan": {name: x for name, x in vars(self.plan).items() if name != "name"},
            "tasks": list(self.tasks),
            "versions": versions("captum", "scikit-learn", "scipy"),
        }
