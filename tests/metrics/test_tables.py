"""Tables of an evaluation: what is printed, and what is better, worse or undecided."""

from __future__ import annotations

from typing import Any

import pytest

from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.tables import Cell, in_markdown, in_text

RATES = {"top": (0.1,), "bottom": (0.5, 0.9)}


def result(texts: int = 4, quantity: str = "nll") -> FaithfulnessResult:
    """A loses 1, b loses 2 at the bottom and 3 at the top, and c now more than a and now less."""
    records = []
    for n in range(texts):
        clean = float(n)
        nll = {
            "a": {"top": [clean + 1], "bottom": [clean + 1, clean + 1]},
            "b": {"top": [clean + 3], "bottom": [clean + 2, clean + 2]},
            "c": {"top": [clean + (-1) ** n], "bottom": [clean + 0.5, clean + 1 + (-1) ** n]},
        }
        values: dict[str, Any] = {"clean": clean, "clean_nll": clean, "count": n + 1}
        records.append({"index": n, **values, "values": nll, "nll": nll})
    settings = {"quantity": quantity, "higher_is_better": False}
    return FaithfulnessResult(RATES, settings, records)


def test_a_printed_result_has_a_row_for_each_rate_and_a_mark_at_each_figure() -> None:
    first, top, bottom, legend = str(result()).split("\n\n")
    assert first == "nll with nothing removed: 1.5 (texts: 4)"
    assert top.splitlines()[0] == "Top removed (higher is better): rise of nll"
    heads, row = (line.split() for line in top.splitlines()[1:])
    assert heads == ["a", "b", "c"]
    assert row == ["10%", "1", "3", "+", "0", "~"]
    rows = [line.split() for line in bottom.splitlines()[2:]]
    assert rows == [
        ["50%", "1", "2", "-", "0.5", "+"],
        ["90%", "1", "2", "-", "1", "~"],
    ]
    assert legend.startswith("+ is better than a, and - is worse. ~ is undecided: ")


def test_one_text_has_no_marks() -> None:
    printed = str(result(texts=1))
    assert printed.endswith("One text does not give an interval, so methods are not compared.")
    assert not set("+~") & set(printed)


def test_a_table_in_markdown_has_what_can_go_first() -> None:
    assert result().to_markdown().splitlines() == [
        "| method | bottom 50% | bottom 90% | top 10% |",
        "| --- | ---: | ---: | ---: |",
        "| a | 1 | 1 | 1 |",
        "| b | 2 - | 2 - | **3** |",
        "| c | **0.5** | 1 ~ | 0 ~ |",
    ]
    lines = result().to_markdown("b").splitlines()
    assert lines[2:4] == ["| a | **1** | **1** | 1 - |", "| b | 2 | 2 | 3 |"]


def test_the_tables_of_perplexity_are_of_the_corpus() -> None:
    of = result(quantity="perplexity")
    assert str(of).startswith(f"corpus perplexity with nothing removed: {of.clean_corpus:.3g}")
    assert of.to_markdown() == of.to_markdown(statistic="corpus") != of.to_markdown(statistic="nll")


@pytest.mark.parametrize("texts", [1, 4])
def test_an_unknown_reference_is_an_error(texts: int) -> None:
    with pytest.raises(KeyError, match="'d' was not evaluated; there are a, b, c"):
        result(texts).to_markdown("d")
    with pytest.raises(ValueError, match="statistic"):
        result(texts).to_markdown(statistic="median")  # type: ignore[arg-type]


def test_a_wide_table_is_broken_for_a_terminal() -> None:
    columns = {f"method {n}": [Cell(1000.0 * n, "better"), Cell(0.5, None)] for n in range(12)}
    lines = in_text(["1%", "10%"], columns).splitlines()
    assert max(map(len, lines)) <= 80
    assert [n for n, line in enumerate(lines) if not line] == [3]
    assert len(lines) == 3 + 1 + 3
    for n in range(12):
        assert sum(f"method {n} " in f"{line} " for line in lines) == 1


def test_a_loss_of_what_should_be_high_is_called_so() -> None:
    of = result(quantity="log_prob")
    higher = FaithfulnessResult(of.rates, {**of.settings, "higher_is_better": True}, of.records)
    assert "Top removed (higher is better): loss of log_prob" in str(higher)


def test_one_method_is_not_compared() -> None:
    of = result()
    records = [
        {**record, "values": {"a": record["values"]["a"]}, "nll": {"a": record["nll"]["a"]}}
        for record in of.records
    ]
    printed = str(FaithfulnessResult(of.rates, of.settings, records))
    assert printed.endswith("One method alone is not compared.")


def test_infinite_figures_have_no_mark() -> None:
    of = result()
    of.records[0]["values"]["b"]["top"][0] = float("inf")
    assert "| b | 2 - | 2 - | inf |" in of.to_markdown()


def test_bars_in_names_do_not_break_a_table() -> None:
    assert in_markdown(["method", "x"], [["a|b", "1"]]).splitlines()[-1] == r"| a\|b | 1 |"
