"""One model on one set of texts, and how much of it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from captum_cw.data import token_batches
from captum_cw.metrics.identity import checksum, fingerprint

__all__ = ["FULL", "PAPER_DATA", "PAPER_MODELS", "PAPER_TASKS", "PLANS", "QUICK", "Plan", "Study"]


@dataclass(frozen=True)
class Plan:
    """How many texts, how long, and at how many rates.

    Args:
        name: Of the plan.
        texts: Of the analyses.
        length: The most tokens of each.
        correlations: Texts and tokens for the correlation of components.
        scaling: Texts and tokens for the scaling of the first token's value.
        removal: Texts and tokens for comprehensiveness and sufficiency.
        top: Fractions that are removed from the top.
        bottom: Fractions that are removed from the bottom.
        points: Of the sample of a regression.
        documents: Of each downstream task.
        skip: Texts that are passed over first, so that claims can be judged on unseen ones.
        batch_size: Texts in a pass of the metric.
        seed: Of all random choices.
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
        """Texts that it reads."""
        return self.skip + max(pair[0] for pair in self.pairs)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Texts and tokens of all that is run."""
        return (self.texts, self.length), self.correlations, self.scaling, self.removal

    def resized(self, texts: int | None, length: int | None, documents: int | None = None) -> Plan:
        """With no more texts, tokens and documents than these."""

        def smaller(pair: tuple[int, int]) -> tuple[int, int]:
            return min(pair[0], texts or pair[0]), min(pair[1], length or pair[1])

        (most, longest), correlations, scaling, removal = map(smaller, self.pairs)
        return replace(
            self,
            texts=most,
            length=longest,
            correlations=correlations,
            scaling=scaling,
            removal=removal,
            documents=min(self.documents, documents or self.documents),
        )


QUICK = Plan("quick", 6, 96, (6, 96), (6, 96), (6, 64), (0.01, 0.1), (0.3, 0.7), 200_000, 50)
FULL = Plan(
    "full", 32, 512, (32, 128), (32, 512), (32, 512), (0.01, 0.02, 0.05, 0.1, 0.2),
    (0.1, 0.3, 0.5, 0.7, 0.9), 1_000_000, 500,
)  # fmt: skip
#: The counts of arXiv 2606.07604, where it gives them.
PAPER = Plan(
    "paper", 32, 512, (32, 128), (128, 1024), (64, 512), (0.01, 0.02, 0.05, 0.1, 0.2),
    (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 5_000_000, 2000,
)  # fmt: skip
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
        model_name: What the model is called.
        data_name: What the texts are called.
        plan: How much is run.
        tasks: Downstream tasks, as lm-evaluation-harness names them.
        task_path: A folder of task files of your own.
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
        """The first texts after those that are skipped, cut to ``length`` tokens.

        Raises:
            ValueError: If there are none.
        """
        skip = self.plan.skip
        if skip >= len(self.texts):
            raise ValueError(
                f"{self.data_name} has {len(self.texts)} texts, of which {skip} are skipped: skip "
                "fewer."
            )
        device = next(self.model.parameters()).device
        batches = token_batches(
            self.texts[skip:], self.tokenizer, length=length, samples=texts, batch_size=batch_size
        )
        return [{name: x.to(device) for name, x in batch.items()} for batch in batches]

    @cached_property
    def analysed(self) -> list[dict[str, Tensor]]:
        """The texts of most analyses, one by one."""
        return self.batches(self.plan.texts, self.plan.length)

    def identity(self) -> Mapping[str, Any]:
        """What has to be the same for results to belong together."""
        return {
            "weights": fingerprint(self.model),
            "texts": checksum(*(batch["input_ids"] for batch in self.analysed)),
            "plan": {name: x for name, x in vars(self.plan).items() if name != "name"},
            "tasks": list(self.tasks),
        }
