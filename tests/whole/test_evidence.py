"""The benchmark of evidence reads rows, ranks tokens and writes its page as it says."""

from __future__ import annotations

import importlib
import json
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from captum_cw import EffectContributions, InputContributions, TargetContributions, TokenScores
from captum_cw._utils.records import Records
from support.paths import ROOT, shared_data

CONTEXTS = "a b c d e", "f g h a b", "c a d b"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("evidence")


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    """Its words are letters, and line breaks are unknown words; the begin token is the last."""
    tiny_tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex(r"\n|\w"), "removed", invert=True)
    tiny_tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tiny_tokenizer


@pytest.fixture
def rows(tiny_model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Three rows that the model gets right; the second word is the evidence."""
    made = []
    for context in CONTEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(context).input_ids]
        with torch.no_grad():
            logits = tiny_model(torch.tensor([ids])).logits[0, -1, 1:53]
        good, bad = (
            tokenizer.decode([int(place) + 1]) for place in (logits.argmax(), logits.argmin())
        )
        made.append({"context": context, "good": good, "bad": bad, "evidence": [[2, 3]]})
    return made


def test_a_row_becomes_tokens(evidence: ModuleType, tokenizer: Any) -> None:
    row = {"context": "a bb c", "good": " d e", "bad": " d f", "evidence": [[2, 4]]}
    a, b, c, d, e, f = range(1, 7)
    begin = tokenizer.bos_token_id
    assert evidence.question_of(row, tokenizer, begin) == evidence.Question(
        [begin, a, b, b, c, d], [2, 3], good=e, bad=f
    )
    del row["bad"]
    assert evidence.question_of(row, tokenizer, begin) == evidence.Question(
        [begin, a, b, b, c], [2, 3], good=d, bad=None
    )


ALL = {"good": "e", "bad": "f", "evidence": [[0, 5]]}


@pytest.mark.parametrize("change", [{"bad": "d"}, {"good": "d"}, {"evidence": []}, ALL])
def test_rows_that_do_not_ask_anything_are_left_out(
    evidence: ModuleType, tokenizer: Any, change: dict[str, Any]
) -> None:
    row = {"context": "a b c", "good": "d e", "bad": "d f", "evidence": [[2, 3]]}
    assert evidence.question_of({**row, **change}, tokenizer, 0) is None


def test_the_begin_token_is_the_tokenizers_own(evidence: ModuleType, tokenizer: Any) -> None:
    assert evidence.begin_token(tokenizer) == tokenizer.bos_token_id
    tokenizer.bos_token = None
    tokenizer.eos_token = "b"
    assert evidence.begin_token(tokenizer) == 2


def test_the_best_token_of_the_evidence_gives_the_rank(evidence: ModuleType) -> None:
    scores = [9.0, 1.0, 3.0, -4.0, 2.0]
    assert evidence.rank_of(scores, [2]) == 1  # the first token does not count
    assert evidence.rank_of(scores, [1, 4]) == 2
    assert evidence.rank_of(scores, [3]) == 4
    assert evidence.rank_of([0.0] * 5, [2]) == 2.5


@pytest.mark.parametrize(("tokens", "count"), [(4, 1), (5, 2), (5, 4)])
def test_chance_is_the_mean_over_all_orders(evidence: ModuleType, tokens: int, count: int) -> None:
    ranks = [1 / (1 + min(order[:count])) for order in permutations(range(tokens))]
    assert evidence.chance(tokens, count) == pytest.approx(sum(ranks) / len(ranks))


def test_scores_are_those_of_the_classes_and_are_kept(
    evidence: ModuleType,
    tiny_model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    wrong = {**rows[0], "good": rows[0]["bad"], "bad": rows[0]["good"]}
    numbers = {"count": 3, "gradient_count": 2}

    def run(records: Records) -> Any:
        return evidence.run(tiny_model, tokenizer, [wrong, *rows], records, **numbers)

    with Records(tmp_path / "rows.records", {}) as records:
        found = run(records)
        kept = len(records)
    assert (found.read, [*found.questions]) == (4, [1, 2, 3])
    assert found.scores.keys() == {*evidence.NAMES, *evidence.CONTROLS} - {evidence.LXT}
    for number, question in found.questions.items():
        ids, asked = torch.tensor([question.ids]), (question.good, question.bad)
        for kind in ("frozen", "attnlrp"):
            inputs = InputContributions(tiny_model, attention=kind)
            expected = {f"input, {kind}": inputs.attribute(ids, asked[0], contrast=asked[1])}
            for form in ("signed", "absolute"):
                values = TokenScores(
                    TargetContributions(tiny_model, attention=kind),
                    *("sum", "sum", "sum"),
                    signed=form == "signed",
                )
                scores = values.attribute(ids, None, asked[0], contrast=asked[1])
                expected[f"values, {kind}, {form}"] = scores
            for name, scores in expected.items():
                assert torch.allclose(torch.tensor(found.scores[name][number]), scores[0], 1e-4)
        for form in evidence.FORMS:
            effects = EffectContributions(tiny_model, form=form)
            maps = torch.stack(effects.attribute(ids, asked[0], contrast=asked[1]))
            scores = maps.double().abs().sum((0, 2, 3)).float()
            assert torch.allclose(torch.tensor(found.scores[form][number]), scores[0], 1e-4)
    assert [*found.scores[evidence.GRADIENTS]] == [1, 2]
    with Records(tmp_path / "rows.records", {}) as records:
        assert run(records).scores == found.scores
        assert len(records) == kept


def test_gradients_of_a_batch_are_those_of_its_rows(
    evidence: ModuleType, tiny_model: Any, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    asked = [evidence.question_of(row, tokenizer, 63) for row in rows[:2]]
    both = evidence.input_x_gradient(tiny_model, asked).detach()
    whole = evidence.integrated_gradients(tiny_model, tokenizer, asked).detach()
    for i, question in enumerate(asked):
        assert torch.allclose(both[i], evidence.input_x_gradient(tiny_model, [question])[0])
        ids = torch.tensor([question.ids, [question.ids[0], *[0] * (len(question.ids) - 1)]])
        with torch.no_grad():
            value, baseline = evidence.value(tiny_model(ids).logits[:, -1], [question])
        assert float(whole[i].sum()) == pytest.approx(float(value - baseline), rel=0.01)


def test_one_command_writes_the_page_with_lxts_scores(
    evidence: ModuleType,
    tiny_model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data, page, work = tmp_path / "sets", tmp_path / "page.md", tmp_path / "work"
    data.mkdir()
    (data / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    page.write_text(
        "Before <!-- first --><!-- end of first --><!-- tables --> old <!-- end of tables --> after"
    )
    command = ["--model", f"tiny={tmp_path / 'model'}", "--data", str(data), "--rows", "2"]
    command += ["--limit", "letters=3,1", "--work", str(work), "--out", str(page)]
    command += ["--runner-up", "letters"]

    assert evidence.main(command) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before ")
    assert text.endswith(" after")
    assert "| rows used | 3 | 3 |" in text
    assert f"| {evidence.LXT} |" not in text
    figures = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    methods = figures["tiny"]["letters"]["methods"]
    assert methods[evidence.GRADIENTS]["rows"] == 1
    for entry in methods.values():
        mean, low, high = entry["mrr"]
        assert 0 < low <= mean <= high <= 1

    questions = json.loads((work / "tiny" / "letters.questions.json").read_text("utf-8"))
    foils = json.loads((work / "tiny" / "letters, runner-up.questions.json").read_text("utf-8"))
    answers = []
    for row, question in questions.items():
        with torch.no_grad():
            logits = tiny_model(torch.tensor([question["ids"]])).logits[0, -1]
        target = float(logits[question["good"]] - logits[question["bad"]])
        logits[question["good"]] = -torch.inf
        assert foils[row] == {**question, "bad": int(logits.argmax())}
        scores = [float(place in question["evidence"]) for place in range(len(question["ids"]))]
        answers.append({"row": int(row), "target": target, "scores": scores})
    place = work / "tiny" / "letters.lxt.jsonl"
    place.write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    assert evidence.main(command) == 0
    assert f"| {evidence.LXT} | **1.00 (1.00 to 1.00)** |  |" in page.read_text(encoding="utf-8")

    answers[0]["target"] += 1
    place.write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    with pytest.raises(ValueError, match="the same model"):
        evidence.main(command)


def test_the_evidence_of_each_set_is_found(evidence: ModuleType, smollm2: tuple[Any, Any]) -> None:
    files = sorted(shared_data("evidence").glob("*.jsonl"))
    assert len(files) == 6
    for file in files:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        questions = [evidence.question_of(row, smollm2[1], 0) for row in rows]
        assert sum(question is not None for question in questions) > 0.9 * len(rows), file
        for row, question in zip(rows, questions, strict=True):
            if question is not None:
                found = smollm2[1].decode([question.ids[place] for place in question.evidence])
                words = [row["context"][start:end] for start, end in row["evidence"]]
                assert all(word in found for word in words), (row, found)
