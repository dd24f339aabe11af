"""Measure whether a ranking depends on what stands in the place of removed values.

    python benchmarks/replacements.py --model M --data gsm8k=FILE --data wikitext=FILE

The paper sets values to zero, which a model was not trained for. Here the same pairs are removed in
three ways: ``zero`` sets the value to zero; ``mean`` sets it to the mean value of its head over the
text; ``hidden`` hides the key, so that attention is renormalised, as a cache without it would.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pages import (
    add_documents,
    documents,
    fill_page,
    is_whole,
    legend,
    loaded,
    made_by,
    parser_of,
    save_picture,
)
from peers_of_removal import register_peers
from ranking import PAPER, RATES, SCORES, Results, figure, standings
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from captum_cw import ComprehensivenessSufficiency, measures
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records
from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.batch import BatchRun, Part
from captum_cw.metrics.identity import checksum, fingerprint
from captum_cw.models.loading import origin
from captum_cw.removal.changes import FixedChange
from captum_cw.removal.options import Factors
from captum_cw.weights import expand_heads

NAME = "captum_cw_replaced"
How = Literal["zero", "mean", "hidden"]
HOWS: tuple[How, ...] = ("zero", "mean", "hidden")
COMPARED = {
    name: SCORES[name]
    for name in (
        *(PAPER, "joint", "effect, frozen", "vwon", "attention", "CAOTE"),
        measures.RANDOM,
    )
}


@contextmanager
def replaced(model: Any, factors: Factors, how: How, real: Tensor) -> Iterator[None]:
    """Run the attention of a model of transformers without some values.

    Args:
        model: The model, with ``attn_implementation="sdpa"``.
        factors: For each layer ``(B, H, S)``, zero at what is removed; None for nothing.
        how: What stands in the place of removed values.
        real: ``(B, S)``, False at padding, which means leave out.
    """

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        H, (T, S) = query.shape[1], (query.shape[2], key.shape[2])
        key, value = expand_heads(key, H), expand_heads(value, H)
        kept, mask = factors[module.layer_idx], attention_mask
        if kept is not None and how == "hidden":
            if mask is None:
                mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
            mask = mask & (kept != 0)[:, :, None]
        elif kept is not None:
            there = real[:, None, :, None].to(value)
            mean = (value * there).sum(2, keepdim=True) / there.sum(2, keepdim=True)
            gone = (1 - kept)[..., None]
            value = value * kept[..., None] + (gone * mean if how == "mean" else 0)
        y = scaled_dot_product_attention(
            query, key, value, mask, scale=scaling, is_causal=mask is None
        )
        return y.transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def of_batch(
    metric: ComprehensivenessSufficiency, name: str, method: object, batch: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the mean negative log-likelihood of each text, unchanged and after each removal.

    By way of replacement and end of the ranking there is a list over rates, of lists over texts.
    """
    with torch.no_grad():
        examples = [{"index": n} for n in range(len(batch["input_ids"]))]
        scorers = {name: metric._scorer(method)}
        run = BatchRun(metric._plan, Part(batch, examples), scorers, None)
        unchanged = run.unchanged.nll
        assert unchanged is not None
        found: dict[str, Any] = {"clean": unchanged.tolist(), "count": run.counts.tolist()}
        for how in HOWS:
            found[how] = {which: [] for which in metric.rates}
            for which, rates in metric.rates.items():
                for rate in rates:
                    change = run.removal(name, rate, which)
                    assert isinstance(change, FixedChange)
                    with replaced(metric.model, change.factors, how, run.token_mask):
                        nll = run.measured(run.logits()).nll
                    assert nll is not None
                    found[how][which].append(nll.tolist())
    return found


def result_of(batches: Sequence[dict[str, dict[str, Any]]], how: How) -> FaithfulnessResult:
    """Return the result of one way of replacement, from what ``of_batch`` found by method."""
    records: list[dict[str, Any]] = []
    for of_methods in batches:
        first = of_methods[PAPER]
        for n, (clean, count) in enumerate(zip(first["clean"], first["count"], strict=True)):
            nll = {
                name: {which: [x[n] for x in rates] for which, rates in of[how].items()}
                for name, of in of_methods.items()
            }
            values = {"clean": clean, "clean_nll": clean, "count": count}
            records.append({"index": len(records), **values, "values": nll, "nll": nll})
    settings = {"quantity": "nll", "higher_is_better": False}
    return FaithfulnessResult({w: tuple(r) for w, r in RATES.items()}, settings, records)


def _parser() -> argparse.ArgumentParser:
    text = "Measure whether a ranking depends on what stands in the place of removed values."
    parser = parser_of("replacements", text)
    add_documents(parser)
    add = parser.add_argument
    add("--ranking", default="global", help="which pairs are ranked together")
    return parser


def found_of(
    metric: ComprehensivenessSufficiency,
    batches: Sequence[dict[str, Tensor]],
    records: Records,
    bar: Any,
) -> list[dict[str, dict[str, Any]]]:
    """Compute what is missing, and return what ``of_batch`` finds, by batch and method."""
    methods = {name: make(metric.model, "sum") for name, make in COMPARED.items()}
    found = []
    for n, batch in enumerate(batches):
        of_methods = {}
        for name, method in methods.items():
            key = f"{n}: {name}"
            if key not in records:
                records[key] = of_batch(metric, name, method, batch)
            of_methods[name] = records[key]
            bar.update()
        found.append(of_methods)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and fill the page."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    register_peers()
    weights = []
    results: Results = {}
    for source in options.model or [None]:
        model, tokenizer, name = loaded(source, options.threads)
        weights.append(origin(model))
        metric = ComprehensivenessSufficiency(
            model, RATES, scoring="clean", reduction="sum", ranking=options.ranking
        )
        for data, file in options.data:
            batches = documents(file, tokenizer, options)
            ids = checksum(*(batch["input_ids"] for batch in batches))
            options.work.mkdir(parents=True, exist_ok=True)
            run = {
                "weights": fingerprint(model),
                "data": file,
                "ids": ids,
                "ranking": options.ranking,
            }
            run |= {"length": options.length, "samples": options.samples}
            steps = len(batches) * len(COMPARED)
            file_of_run = options.work / f"{name}-{data}.records"
            if options.finished and not is_whole(file_of_run, steps):
                continue
            title = f"Replacements, {name}, {data}"
            with (
                Records(file_of_run, run) as records,
                progress_bar(steps, title, show=True) as bar,
            ):
                found = found_of(metric, batches, records, bar)
            for how in HOWS:
                results[name, data, how] = result_of(found, how)
    head = (
        f"{made_by('replacements', argv, options.commit, weights)} "
        f"The last {options.samples} documents of each set, cut to {options.length} tokens. "
        "`zero` sets a removed value to "
        "zero, as the paper does; `mean` sets it to the mean value of its head over the text; "
        "`hidden` hides its key, so that attention is renormalised. Cells are changes of corpus "
        "perplexity: with the bottom removed, lower is better; with the top removed, higher is "
        f"better. {legend(PAPER, 'documents')}"
    )
    title = "Does it matter what stands in the place of a removed value?"
    parts = [standings(results, HOWS, "replaced by")]
    for how in HOWS:
        chosen = {f"{m}, {data}": of for (m, data, key), of in results.items() if key == how}
        save_picture(figure(chosen), options.out / f"replacements-{how}.png")
        parts.append(f"![Where each score stands: {how}.](replacements-{how}.png)")
    tables = "\n\n".join(
        f"### {', '.join(key)}\n\n{result.to_markdown(PAPER, statistic='corpus')}"
        for key, result in results.items()
    )
    shown = {"first": "\n\n".join(parts), "command": head, "tables": tables}
    fill_page(options.out / "replacements.md", title, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
