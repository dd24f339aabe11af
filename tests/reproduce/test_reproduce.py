"""``captum-cw reproduce``: the report, resumption, and the rules that judge the claims."""

from __future__ import annotations

import json
import random
import re
import string
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from captum_cw import analysis
from captum_cw._utils.records import RecordsError
from captum_cw.cli import main
from captum_cw.cli.reproduce import _short_name
from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.identity import fingerprint
from captum_cw.metrics.tasks import TaskResult
from captum_cw.reproduce import ITEMS, PLANS, Plan, Study, reproduce
from captum_cw.reproduce.claims import CLAIMS, Claim, Judgement, above, below, judge

PLAN = Plan(
    "tiny",
    5,
    12,
    (5, 8),
    (5, 8),
    (5, 8),
    (0.2, 0.4),
    (0.3, 0.6),
    points=500,
    documents=10,
    batch_size=5,
)
BY_NAME = {claim.name: claim for claim in CLAIMS}


@pytest.fixture
def texts() -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choices(string.ascii_letters, k=20)) for _ in range(5)]


@pytest.fixture
def study(tiny_model: Any, tiny_tokenizer: Any, texts: list[str]) -> Study:
    return Study(tiny_model, tiny_tokenizer, texts, "tiny <b>model</b>", "letters", PLAN)


def run(study: Study, out: Path, only: list[str] | None = None) -> tuple[Any, list[str]]:
    told: list[str] = []
    (found,), _ = reproduce([study], out, only=only, tell=told.append)
    return found, told


def test_the_report_holds_every_item_and_claim(study: Study, tmp_path: Path) -> None:
    found, told = run(study, tmp_path)
    begun = [line for line in told if "not computed" not in line]
    assert len(begun) == len(ITEMS)
    assert len(told) == len(ITEMS) + sum(bool(done.refused) for done in found.items)
    page = (tmp_path / "report.html").read_text()
    assert "tiny &lt;b&gt;model&lt;/b&gt;" in page
    assert f"<td>checksum {fingerprint(study.model)}</td>" in page
    assert "<b>model" not in page
    # The report is self-contained: it includes every picture.
    assert not re.search(r'(src|href)="(?!data:image/webp;base64,|#)', page)
    for done in found.items:
        assert f"{done.item.name}: {done.item.title}" in unescape(page)
        if done.result is not None:
            shown = page.count(f'alt="{done.item.name}: ')
            assert shown == len(done.item.pictures(done.result))
    of = {done.item.name: done for done in found.items}
    compared = of["F3"].result.compare("contribution", "vw", "sufficiency", statistic="nll")
    numbers = [float(x[1]) for x in (compared.difference, compared.low, compared.high)]
    cell = of["F3"].item.table("F3", of["F3"].result).loc["contribution - vw (95%)"].iloc[3]
    assert cell == "{:.3f} ({:.3f} to {:.3f})".format(*numbers)
    assert f">{cell}<" in page
    refused = {done.item.name: done.refused for done in found.items if done.result is None}
    assert "no tasks were given" in refused["F4"]
    # A random model need not have a sink, and these texts are short.
    assert set(refused) <= {"F4", "F5c", "assumptions"}
    for reason in refused.values():
        assert reason in unescape(page)
    for claim in CLAIMS:
        assert claim.rule in unescape(page)
    claims = pd.read_csv(tmp_path / "claims.csv")
    assert claims["claim"].tolist() == list(BY_NAME)
    assert set(claims["verdict"]) <= {"holds", "does not hold", "undecided", "not run"}


def test_a_run_goes_on_where_it_stopped(study: Study, tmp_path: Path) -> None:
    names = ["T2", "T4", "F5a"]
    whole, _ = run(study, tmp_path / "whole", names)
    stopped: list[str] = []

    def stop(line: str) -> None:
        stopped.append(line)
        if len(stopped) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce([study], tmp_path / "again", only=names, tell=stop)
    again, told = run(study, tmp_path / "again", names)
    assert len(told) == 1
    for a, b in zip(whole.items, again.items, strict=True):
        assert a.result.numbers == b.result.numbers
        assert a.result.to_dataframe().equals(b.result.to_dataframe())
    assert run(study, tmp_path / "again", names)[1] == []


def test_another_plan_model_or_text_is_another_run(study: Study, tmp_path: Path) -> None:
    run(study, tmp_path, ["T2"])
    with pytest.raises(RecordsError, match="of another run"):
        run(replace(study, plan=replace(PLAN, points=400)), tmp_path, ["T2"])
    with pytest.raises(RecordsError, match="of another run"):
        run(replace(study, texts=["a b c d e f"] * 5), tmp_path, ["T2"])
    with pytest.raises(ValueError, match="only='T9' is unknown"):
        run(study, tmp_path, ["T9"])


def test_an_item_that_a_model_does_not_support_is_reported(study: Study, tmp_path: Path) -> None:
    found, _ = run(replace(study, texts=["a b c", "d e f"]), tmp_path, ["F6", "T2"])
    cone, correlations = found.items
    assert cone.result is None
    assert "Text 0 has 3 tokens" in cone.refused
    assert correlations.result is not None
    assert "Not computed: Text 0 has 3 tokens" in (tmp_path / "report.html").read_text()
    assert found.judgement(BY_NAME["low norms outside the cone"]).verdict == "not run"
    # Only the refused item is tried again.
    _, told = run(replace(study, texts=["a b c", "d e f"]), tmp_path, ["F6", "T2"])
    begun, refusal = told
    assert begun.partition(": ")[2].startswith("F6")
    assert refusal.startswith("F6 is not computed: Text 0 has 3 tokens")


def test_the_command_line(
    tiny_model: Any,
    tiny_tokenizer: Any,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    place = ["--model", str(tmp_path / "model"), "--data", str(data), "--out", str(tmp_path / "o")]
    assert main(["reproduce", *place, "--quick", "--only", "T2,T4", "--length", "10"]) == 0
    printed = capsys.readouterr()
    assert "components weakly correlated" in printed.out
    assert "model on letters: T4" in printed.err
    page = (tmp_path / "o" / "report.html").read_text()
    assert str(tmp_path) not in page
    assert "<td>model, checksum " in page
    with pytest.raises(SystemExit, match="2"):
        main(["reproduce", "--out", str(tmp_path / "p")])
    assert "--preset paper, which chooses both" in capsys.readouterr().err


def test_a_missing_library_of_tasks_is_named_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    place = ["--model", str(tmp_path), "--data", "gsm8k", "--out", str(tmp_path / "o")]
    assert main(["reproduce", *place, "--preset", "paper"]) == 1
    assert "lm_eval is not installed" in capsys.readouterr().err
    # The other items do not need the library, so the command goes on and loads the texts.
    place[3] = str(tmp_path / "none.jsonl")
    assert main(["reproduce", *place, "--preset", "paper", "--only", "T2"]) == 1
    assert "none.jsonl" in capsys.readouterr().err


def test_names_of_folders_keep_their_dots_and_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "Llama-3.1-8B").mkdir(parents=True)
        (tmp_path / folder / "texts.v2.jsonl").write_text('{"text": "a"}')
    assert _short_name(str(tmp_path / "a" / "Llama-3.1-8B")) == "Llama-3.1-8B"
    assert _short_name(str(tmp_path / "a" / "texts.v2.jsonl")) == "texts.v2"
    assert _short_name("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    data = [str(tmp_path / folder / "texts.v2.jsonl") for folder in ("a", "b")]
    command = ["reproduce", "--model", "M", "--data", data[0], "--data", data[1], "--out", "o"]
    assert main(command) == 1
    assert "have the same name in the report" in capsys.readouterr().err


def test_plans_shrink_but_do_not_grow() -> None:
    small = PLANS["full"].resized(4, 64)
    assert (small.texts, small.length, small.removal, small.correlations) == (
        4,
        64,
        (4, 64),
        (4, 64),
    )
    assert PLANS["quick"].resized(1000, None) == PLANS["quick"]
    assert PLANS["quick"].resized(None, None, documents=7) == replace(PLANS["quick"], documents=7)


def test_texts_that_are_skipped_are_not_read(
    study: Study, texts: list[str], tmp_path: Path
) -> None:
    later = replace(study, plan=replace(study.plan, skip=2))
    assert later.plan.needed == study.plan.needed + 2
    for seen, given in zip(later.batches(3, 6), texts[2:5], strict=True):
        assert seen["input_ids"].tolist() == [study.tokenizer(given).input_ids[:6]]
    found, _ = run(later, tmp_path, ["T4"])
    alone = analysis.first_token_weight(study.model, later.analysed)
    assert found.items[0].result.numbers == alone.numbers
    assert "after the first 2;" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match=f"has {len(texts)} texts, of which 99 are skipped"):
        replace(study, plan=replace(study.plan, skip=99)).batches(1, 4)


# ---------------------------------------------------------------------------------------------
# The rules


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.2, 1.0], "holds"),
        ([-1.0, -1.1, -0.9, -1.2, -1.0], "does not hold"),
        ([1.0, -1.1, 0.9, -1.2, 0.1], "undecided"),
        ([1.0, 1.1, 0.9, 1.2], "undecided"),  # too few
    ],
)
def test_means_are_judged_by_their_interval(values: list[float], verdict: str) -> None:
    assert above(values).verdict == verdict
    turned = {"holds": "does not hold", "does not hold": "holds"}
    assert below(values).verdict == turned.get(verdict, verdict)
    assert ("no interval for fewer than 5" in above(values).figures) == (len(values) < 5)


def removal(losses: Mapping[str, Callable[[int], float]], texts: int = 8) -> FaithfulnessResult:
    """Return a result with the given loss of each method on each text, at two rates per side."""
    records = [
        {
            "index": n,
            "clean": 1.0,
            "clean_nll": 1.0,
            "count": 10,
            **{
                what: {
                    name: {side: [1 + loss(n), 1 + 2 * loss(n)] for side in ("top", "bottom")}
                    for name, loss in losses.items()
                }
                for what in ("values", "nll")
            },
        }
        for n in range(texts)
    ]
    rates = {"top": (0.01, 0.1), "bottom": (0.3, 0.5)}
    return FaithfulnessResult(rates, {"higher_is_better": False}, records)


def constant(x: float) -> Callable[[int], float]:
    return lambda n: x + 0.01 * n


def test_better_means_ahead_in_most_and_behind_in_none() -> None:
    # Low losses are good for the bottom and bad for the top, so one side is lost.
    losses = {"contribution": 0.1, "attention": 0.5, "vw": 0.4, "vwon": 0.3}
    result = removal({name: constant(x) for name, x in losses.items()})
    found = judge(BY_NAME["most faithful"], {"F3": result})
    assert found == Judgement("undecided", "ahead in 6, behind in 6 of 12 comparisons, 8 texts")
    one_side = FaithfulnessResult({"bottom": (0.3, 0.5)}, result.settings, result.records)
    assert judge(BY_NAME["most faithful"], {"F3": one_side}).verdict == "holds"
    assert judge(BY_NAME["VW-ON over VW"], {"F3": one_side}).verdict == "holds"
    worst = removal({name: constant(1 - x) for name, x in losses.items()})
    worst = FaithfulnessResult({"bottom": (0.3, 0.5)}, worst.settings, worst.records)
    assert judge(BY_NAME["most faithful"], {"F3": worst}).verdict == "does not hold"
    few = FaithfulnessResult({"bottom": (0.3, 0.5)}, result.settings, result.records[:3])
    assert judge(BY_NAME["most faithful"], {"F3": few}).verdict == "undecided"


def test_the_gap_is_that_of_attention_to_contributions() -> None:
    wide = removal({"contribution": constant(0.1), "attention": constant(0.9)})
    narrow = removal({"contribution": constant(0.1), "attention": constant(0.2)})
    claim = BY_NAME["global narrows the gap"]
    assert judge(claim, {"F9a": wide, "F9": narrow}).verdict == "holds"
    assert judge(claim, {"F9a": narrow, "F9": wide}).verdict == "does not hold"
    # (0.8 - 0.1) * 1.5, the mean over the two rates.
    assert judge(claim, {"F9a": wide, "F9": narrow}).figures.startswith("mean 1.05 nats")
    claim = BY_NAME["sinks unprotected"]
    assert judge(claim, {"F3": narrow, "F10": wide}).verdict == "holds"
    assert judge(claim, {"F3": wide, "F10": narrow}).verdict == "does not hold"


def of_table(name: str, rows: list[dict[str, Any]], **more: Any) -> SimpleNamespace:
    table = pd.DataFrame(rows)
    return SimpleNamespace(tables={name: table}, to_dataframe=lambda: table, **more)


def regression(r2: Mapping[str, float], spread: float = 0.0) -> Any:
    names = (
        "attention",
        "relative norm",
        "cosine",
        "attention x relative norm",
        "attention x cosine",
        "relative norm x cosine",
    )
    rows = [
        {"components": name, "group": group, "r2": r2.get(name, 0.0)}
        for name in names
        for group in ("all", "first", "others")
    ]
    folds = [
        {**row, "fold": n, "r2": row["r2"] + spread * (-1) ** n * (row["components"] in r2)}
        for row in rows
        for n in range(5)
    ]
    found = of_table("regression", rows)
    found.tables["folds"] = pd.DataFrame(folds)
    return found


def test_explanations_are_compared_fold_by_fold() -> None:
    claim = BY_NAME["orientation over magnitude, all tokens"]
    direct = regression({"attention x cosine": 0.8, "attention x relative norm": 0.5})
    assert judge(claim, {"T1": direct}) == Judgement(
        "holds", "R2 0.800, attention x relative norm 0.500"
    )
    opposite = regression({"attention x cosine": 0.3, "attention x relative norm": 0.5})
    assert judge(claim, {"T1": opposite}).verdict == "does not hold"
    uncertain = regression({"attention x cosine": 0.1}, spread=0.2)
    assert judge(claim, {"T1": uncertain}).verdict == "undecided"
    assert judge(BY_NAME["attention and cosine for the tail"], {"T1": direct}).verdict == "holds"
    first = regression({"relative norm x cosine": 0.7, "cosine": 0.5})
    assert judge(BY_NAME["geometry for the first token"], {"T1": first}).verdict == "holds"


def numbers(**found: float) -> Any:
    return SimpleNamespace(numbers={name.replace("_", " "): x for name, x in found.items()})


@pytest.mark.parametrize(
    ("claim", "item", "result", "verdict"),
    [
        ("components weakly correlated", "T2", {"a, b": -0.29, "a, c": 0.1}, "holds"),
        ("components weakly correlated", "T2", {"a, b": -0.4, "a, c": 0.1}, "undecided"),
        ("components weakly correlated", "T2", {"a, b": -0.5, "a, c": 0.1}, "does not hold"),
        ("cosines centred", "F7", {"mean cosine": 0.012}, "holds"),
        ("cosines centred", "F7", {"mean cosine": 0.09}, "does not hold"),
        ("alignment refines", "D.6", {"r": 0.95}, "holds"),
        ("alignment refines", "D.6", {"r": 0.7}, "undecided"),
        ("alignment refines", "D.6", {"r": 0.4}, "does not hold"),
        (
            "least below 1",
            "F5b",
            {"least below 1": 8.0, "heads": 8.0, "least below 1 without g": 8.0},
            "holds",
        ),
        (
            "least below 1",
            "F5b",
            {"least below 1": 7.0, "heads": 8.0, "least below 1 without g": 8.0},
            "does not hold",
        ),
    ],
)
def test_figures_are_judged_by_their_bounds(
    claim: str, item: str, result: dict[str, float], verdict: str
) -> None:
    assert judge(BY_NAME[claim], {item: SimpleNamespace(numbers=result)}).verdict == verdict


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "holds"), (1, "does not hold")])
def test_texts_are_judged_as_they_should(sign: int, verdict: str) -> None:
    spread = [0.5 + 0.01 * n for n in range(6)]
    weights = [
        {"text": n, "measure": name, "weight": 1 + (sign * x if name == "contribution" else 0)}
        for n, x in enumerate(spread)
        for name in ("contribution", "vw", "vw, rows normalised")
    ]
    for name in ("as printed", "rows normalised"):
        claim = BY_NAME[f"first token below VW, {name}"]
        assert judge(claim, {"T4": of_table("texts", weights)}).verdict == verdict
    entropies = [
        {
            "text": n,
            "measure": name,
            "first": first,
            "entropy": 2 + (sign * x if name == "contribution" and not first else 0),
        }
        for n, x in enumerate(spread)
        for name in ("contribution", "attention")
        for first in (True, False)
    ]
    found = judge(BY_NAME["tail more concentrated"], {"T5": of_table("texts", entropies)})
    assert found.verdict == verdict
    alignments = [{"text": n, "first": sign * x, "among": -sign * x} for n, x in enumerate(spread)]
    for name in ("first value opposes", "others agree"):
        assert judge(BY_NAME[name], {"F5a": of_table("texts", alignments)}).verdict == verdict
    shares = [
        {"text": n, "with_sink": 0.5 + sign * x / 2, "without": 0.9 - sign * x / 10}
        for n, x in enumerate(spread)
    ]
    for name in ("low norms outside the cone", "low norms inside without the sink"):
        assert judge(BY_NAME[name], {"F6": of_table("texts", shares)}).verdict == verdict


def test_perplexity_has_to_rise_at_every_step() -> None:
    def scaled(*deltas: float) -> Any:
        return of_table(
            "texts",
            [
                {"text": n, "factor": factor, "delta": delta + 0.01 * n}
                for n in range(6)
                for factor, delta in zip((0.0, 0.5, 1.0), deltas, strict=True)
            ],
        )

    claim = BY_NAME["perplexity rises"]
    assert judge(claim, {"F5c": scaled(3.0, 1.0, 0.0)}).verdict == "holds"
    assert judge(claim, {"F5c": scaled(3.0, -1.0, 0.0)}).verdict == "undecided"
    assert judge(claim, {"F5c": scaled(-3.0, -1.0, 0.0)}).verdict == "does not hold"


@pytest.mark.parametrize(("r2", "verdict"), [(0.95, "holds"), (0.5, "does not hold")])
def test_fits_are_judged_by_layer(r2: float, verdict: str) -> None:
    rows = [
        {"layer": layer, "r2_k": r2 if layer else 0.1, "r2_g": r2 if layer else 0.1}
        for layer in range(3)
        for _ in range(4)
    ]
    found = of_table("heads", rows, numbers={"median r2 of k": r2, "median r2 of g": r2})
    assert judge(BY_NAME["linear in the sink rate"], {"F5b": found}).verdict == verdict


def test_accuracy_is_kept_at_the_largest_rate_within_the_interval() -> None:
    def tasks(**accuracies: list[float]) -> TaskResult:
        record = {
            "metric": "acc,none",
            "documents": 100,
            "baseline": {"acc,none": [0.7, 0.05]},
            "removed": {
                name: [{"acc,none": [x, 0.05]} for x in accuracies.get(name, [0.1, 0.1])]
                for name in ("contribution", "attention", "vw", "vwon")
            },
        }
        return TaskResult((0.3, 0.5), {}, {"quiz": record})

    claim = BY_NAME["accuracy is kept"]
    assert judge(claim, {"F4": tasks(contribution=[0.7, 0.65], vw=[0.7, 0.1])}).verdict == "holds"
    assert (
        judge(claim, {"F4": tasks(contribution=[0.7, 0.1], vw=[0.7, 0.1])}).verdict == "undecided"
    )
    assert judge(claim, {"F4": tasks(vw=[0.7, 0.1])}).verdict == "does not hold"


def test_the_table_of_tasks_has_a_row_for_each_method() -> None:
    removed = {"contribution": [{"acc,none": [0.7, 0.1]}, {"acc,none": [0.4, 0.1]}]}
    quiz = {
        "metric": "acc,none",
        "documents": 20,
        "baseline": {"acc,none": [0.75, 0.1]},
        "removed": removed,
    }
    table = ITEMS["F4"].table("F4", TaskResult((0.3, 0.5), {}, {"quiz": quiz}))
    row = table.loc["quiz, contribution"]
    assert row.tolist() == [0.75, 0.7, 0.4, 0.3]
    quiz["baseline"] = {"acc,none": [0.75, float("nan")]}  # of one document
    result = TaskResult((0.3, 0.5), {}, {"quiz": quiz})
    row = ITEMS["F4"].table("F4", result).loc["quiz, contribution"]
    assert row.tolist()[:3] == [0.75, 0.7, 0.4]
    assert pd.isna(row["largest rate"])
    found = judge(BY_NAME["accuracy is kept"], {"F4": result})
    assert (found.verdict, found.figures) == ("undecided", "no standard error of quiz")


def test_every_claim_is_judged_by_items_that_exist() -> None:
    for claim in CLAIMS:
        assert isinstance(claim, Claim)
        assert set(claim.needs) <= set(ITEMS)
        assert judge(claim, {}).verdict == "not run"
