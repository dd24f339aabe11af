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
from pages import add_documents, loaded, made_by, number, parser_of, table, write_page
from peers_of_removal import register_peers
from ranking import OF_LAYERS, OF_TARGET, PAPER, RATES
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from captum_cw import ComprehensivenessSufficiency, measures
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records
from captum_cw.data import load_texts, token_batches
from captum_cw.functional import expand_heads
from captum_cw.metrics.batch import BatchRun, Part
from captum_cw.metrics.identity import fingerprint
from captum_cw.removal.changes import FixedChange
from captum_cw.removal.options import Factors

NAME = "captum_cw_replaced"
How = Literal["zero", "mean", "hidden"]
HOWS: tuple[How, ...] = ("zero", "mean", "hidden")
SCORES = (
    *(PAPER, "vwon", "vw", "attention", "VATP", "CriticalKV", "OBCache", "CAOTE"),
    *("joint, attnlrp", "effect, frozen", "sensitivity, plain", "target, plain", measures.RANDOM),
)


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
    metric: ComprehensivenessSufficiency, methods: dict[str, object], batch: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the mean negative log-likelihood of each text, unchanged and after each removal."""
    scorers = {name: metric._scorer(method) for name, method in methods.items()}
    with torch.no_grad():
        examples = [{"index": n} for n in range(len(batch["input_ids"]))]
        run = BatchRun(metric._plan, Part(batch, examples), scorers, None)
        unchanged = run.unchanged.nll
        assert unchanged is not None
        found: dict[str, Any] = {"clean": unchanged.tolist(), "count": run.counts.tolist()}
        for name in methods:
            for how in HOWS:
                lost = []
                for which, rates in metric.rates.items():
                    for rate in rates:
                        change = run.removal(name, rate, which)
                        assert isinstance(change, FixedChange)
                        with replaced(metric.model, change.factors, how, run.token_mask):
                            nll = run.measured(run.logits()).nll
                        assert nll is not None
                        lost.append(nll.tolist())
                found[f"{name}, {how}"] = lost
    return found


def rows_of(found: Sequence[dict[str, Any]], names: Sequence[str], how: How) -> list[list[str]]:
    """Return the changes of corpus perplexity, marked as on the pages of rankings."""

    def joined(key: str) -> Tensor:
        return torch.tensor([x for part in found for x in part[key]], dtype=torch.float64)

    counts, clean = joined("count"), joined("clean")

    def nll(name: str) -> Tensor:
        parts = [torch.tensor(part[f"{name}, {how}"], dtype=torch.float64) for part in found]
        return torch.cat(parts, 1)  # (rates, texts)

    def perplexity(x: Tensor, w: Tensor) -> Tensor:
        return ((x * w).sum(-1) / w.sum(-1)).exp()

    drawn = torch.randint(
        len(counts), (10_000, len(counts)), generator=torch.Generator().manual_seed(0)
    )
    bottom = len(RATES["bottom"])
    paper, rows = nll(PAPER), []
    for name in names:
        cells, own = [], nll(name)
        for n, x in enumerate(own):
            cell = number(float(perplexity(x, counts) - perplexity(clean, counts)))
            if name != PAPER:
                w = counts[drawn]
                of = perplexity(x[drawn], w) - perplexity(paper[n][drawn], w)
                low, high = of.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
                ahead = high < 0 if n < bottom else low > 0
                behind = low > 0 if n < bottom else high < 0
                cell = f"**{cell}**" if ahead else f"{cell} -" if behind else f"{cell} ~"
            cells.append(cell)
        rows.append([name, *cells])
    return rows


def _parser() -> argparse.ArgumentParser:
    text = "Measure whether a ranking depends on what stands in the place of removed values."
    parser = parser_of("replacements", text)
    add_documents(parser)
    add = parser.add_argument
    add("--ranking", default="global", help="which pairs are ranked together")
    add("--scores", default=";".join(SCORES), help="the scores, divided by semicolons")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the page of one model."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    register_peers()
    model, tokenizer, name = loaded(options)
    makes = {**OF_LAYERS, **OF_TARGET}
    names = list(dict.fromkeys((PAPER, *options.scores.split(";"))))
    methods = {label: makes[label](model, "sum") for label in names}
    metric = ComprehensivenessSufficiency(
        model, RATES, scoring="clean", reduction="sum", ranking=options.ranking
    )
    heads = ["score", *(f"{which} {100 * r:g}%" for which, rates in RATES.items() for r in rates)]
    pages = []
    for data, source in options.data:
        batches = token_batches(
            load_texts(source)[-options.samples :],
            tokenizer,
            max_length=options.length,
            batch_size=options.batch_size,
        )
        options.work.mkdir(parents=True, exist_ok=True)
        run = {"weights": fingerprint(model), "data": source, "ranking": options.ranking}
        run |= {"length": options.length, "samples": options.samples, "scores": names}
        found = []
        with (
            Records(options.work / f"{name}-{data}.records", run) as records,
            progress_bar(len(batches) * len(names), f"Replacements, {data}", show=True) as bar,
        ):
            for number_of, batch in enumerate(batches):
                whole: dict[str, Any] = {}
                for label in names:
                    key = f"{number_of}: {label}"
                    if key not in records:
                        records[key] = of_batch(metric, {label: methods[label]}, batch)
                    whole |= records[key]
                    bar.update()
                found.append(whole)
        pages += [f"## {data}: {how}\n\n{table(heads, rows_of(found, names, how))}" for how in HOWS]
    head = (
        f"# What stands in the place of a removed value: {name}\n\n"
        f"{made_by('replacements', argv, model)} The last {options.samples} documents of each set, "
        f"cut to {options.length} tokens. `zero` sets a removed value to "
        "zero, as the paper does; `mean` sets it to the mean value of its head over the text; "
        "`hidden` hides its key, so that attention is renormalised. Cells are changes of corpus "
        "perplexity: with the bottom removed, lower is better; with the top removed, higher is "
        f"better. **Bold** cells are ahead of `{PAPER}` in the same column by a paired 95% "
        "interval over documents; `-` marks a cell that is behind, `~` a tie."
    )
    write_page(options.out / f"replacements-{name}.md", [head, *pages])
    return 0


if __name__ == "__main__":
    sys.exit(main())
