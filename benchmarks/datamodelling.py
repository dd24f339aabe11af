"""Measure how well scores of pairs add up to what random removals do (linear datamodelling score).

    python benchmarks/datamodelling.py --data gsm8k=FILE --data wikitext=FILE

From each text, random pairs of head and token are removed many times. A score is good if the sum
over the removed pairs ranks these removals as the loss of log-likelihood does. The result is the
rank correlation of each text, averaged, with an interval over texts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from pages import (
    Intervals,
    add_documents,
    documents,
    dots,
    fill_page,
    is_whole,
    legend,
    loaded,
    made_by,
    mean_and_interval,
    parser_of,
    save_picture,
)
from torch import Tensor

from captum_cw import (
    AttentionWeights,
    ContributionWeights,
    EffectContributions,
    TargetContributions,
    TokenScores,
    VWAttention,
    VWONAttention,
    remove_values,
)
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records
from captum_cw.metrics.identity import checksum, fingerprint
from captum_cw.metrics.tables import in_markdown
from captum_cw.models.loading import origin
from captum_cw.removal.target_scores import OwnText

SCORES: dict[str, Any] = {
    "contribution": ContributionWeights,
    "vwon": VWONAttention,
    "vw": VWAttention,
    "attention": AttentionWeights,
    "joint": EffectContributions,
    "effect, frozen": lambda model: EffectContributions(model, form="effect", gradient="frozen"),
    "sensitivity, plain": lambda model: EffectContributions(
        model, form="sensitivity", gradient="plain"
    ),
    "target, frozen": TargetContributions,
    "target, attnlrp": lambda model: TargetContributions(model, attention="attnlrp"),
}

REFERENCE = "contribution"


def pair_scores(model: Any, name: str, batch: dict[str, Tensor], target: OwnText) -> Tensor:
    """Return the sizes of a measure, summed over queries, ``(B, L, H, S)``."""
    method = SCORES[name](model)
    scores = TokenScores(method, reduction="sum", layers=None, heads=None)
    options = {"target": target} if method.explains_target else {}
    return scores.attribute(batch, **options)


def losses(model: Any, batch: dict[str, Tensor], target: OwnText) -> Tensor:
    """Return the mean negative log-likelihood of each text, ``(B,)``."""
    with torch.no_grad():
        return -target(model(**batch)).double()


def ranks(x: Tensor) -> Tensor:
    """Return the ranks of numbers without ties, along the first dimension."""
    return x.argsort(0).argsort(0).double()


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return the rank correlation along the first dimension."""
    x, y = (ranks(z) - ranks(z).mean(0) for z in (x, y))
    return (x * y).sum(0) / (x.square().sum(0) * y.square().sum(0)).sqrt()


def of_batch(
    model: Any, batch: dict[str, Tensor], rate: float, removals: int, seed: int
) -> dict[str, list[float]]:
    """Return the rank correlation of each score for each text of a batch."""
    real = batch["attention_mask"].bool()
    logits = OwnText.of(batch["input_ids"], real)
    likelihood = OwnText(logits.ids, logits.counted, "log_likelihood")
    scores = {name: pair_scores(model, name, batch, logits) for name in SCORES}
    clean = losses(model, batch, likelihood)
    B, L, H, S = next(iter(scores.values())).shape
    may_go = real.clone()
    may_go[torch.arange(B), real.long().argmax(1)] = False  # the sink stays
    generator = torch.Generator().manual_seed(seed)
    lost, sums = [], {name: [] for name in SCORES}
    for _ in range(removals):
        drawn = torch.rand(B, L, H, S, generator=generator) < rate
        gone = drawn & may_go[:, None, None]
        with remove_values(model, list(gone.unbind(1))):
            lost.append(losses(model, batch, likelihood) - clean)
        for name, x in scores.items():
            sums[name].append(x.double().masked_fill(~gone, 0).sum((1, 2, 3)))
    found = torch.stack(lost)
    return {name: correlation(torch.stack(x), found).tolist() for name, x in sums.items()}


def cell(values: Tensor, reference: Tensor) -> str:
    """Return a mean with its interval, marked by the paired interval of the difference.

    Args:
        values: The correlations of a score, one for each text.
        reference: Those of the score that it is compared with.
    """
    mean, low, high = mean_and_interval(values)
    shown = f"{mean:.3f}"
    if values is not reference:
        _, least, most = mean_and_interval(values - reference)
        shown = f"**{shown}**" if least > 0 else f"{shown} {'-' if most < 0 else '~'}"
    return f"{shown} ({low:.3f} to {high:.3f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and fill the page."""
    text = "Measure how well scores of pairs add up to what random removals do."
    parser = parser_of("datamodelling", text)
    add_documents(parser)
    add = parser.add_argument
    add("--removals", type=int, default=64, help="number of random removals of each text")
    add("--rate", type=float, default=0.1, help="the fraction of pairs that a removal takes")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    weights = []
    columns: dict[str, dict[str, str]] = {}
    drawn: dict[str, Intervals] = {}
    for source in options.model or [None]:
        model, tokenizer, name = loaded(source, options.threads)
        weights.append(origin(model))
        for data, file in options.data:
            batches = documents(file, tokenizer, options)
            ids = checksum(*(batch["input_ids"] for batch in batches))
            options.work.mkdir(parents=True, exist_ok=True)
            settings = {n: getattr(options, n) for n in ("length", "samples", "removals", "rate")}
            run = {
                "model": name,
                "weights": fingerprint(model),
                "data": file,
                "ids": ids,
                **settings,
            }
            values: dict[str, list[float]] = {score: [] for score in SCORES}
            file_of_run = options.work / f"{name}-{data}.records"
            if options.finished and not is_whole(file_of_run, len(batches)):
                continue
            with (
                Records(file_of_run, run) as records,
                progress_bar(len(batches), f"Datamodelling, {name}, {data}", show=True) as bar,
            ):
                for number, batch in enumerate(batches):
                    key = str(number)
                    if key not in records:
                        records[key] = of_batch(
                            model, batch, options.rate, options.removals, number
                        )
                    for score, found in records[key].items():
                        values[score] += found
                    bar.update()
            of = {score: torch.tensor(x) for score, x in values.items()}
            column = f"{name}, {data}"
            drawn[column] = {score: mean_and_interval(x) for score, x in of.items()}
            columns[column] = {score: cell(x, of[REFERENCE]) for score, x in of.items()}
    top = (
        f"{made_by('datamodelling', argv, options.commit, weights)} "
        f"The last {options.samples} documents of each set, cut to {options.length} tokens; "
        f"{options.removals} removals of a "
        f"random {100 * options.rate:g}% of all pairs, but those of the first token. The "
        "correlation is that of the sum of the scores of the removed pairs with the loss of "
        "log-likelihood (Spearman), averaged over documents, with its 95% interval. "
        f"{legend(REFERENCE, 'documents')}"
    )
    title = "Do scores add up to what a removal costs?"
    label = "rank correlation of summed scores and losses"
    save_picture(dots({"": drawn}, label), options.out / "datamodelling.png")
    rows = [[score, *(of[score] for of in columns.values())] for score in SCORES]
    table = in_markdown(["score", *columns], rows)
    figure = "![The rank correlation of each score.](datamodelling.png)"
    shown = {"command": top, "tables": f"{table}\n\n{figure}"}
    fill_page(options.out / "datamodelling.md", title, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
