"""Show which claims of the papers hold, from the reports of ``captum-cw reproduce``.

    python benchmarks/claims.py SmolLM2=docs/results/reproduction-claims.csv Gemma=FILE

The result is the table and the figure of the page on claims.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from pages import OUT, fill_page, named

from captum_cw.metrics.tables import in_markdown
from captum_cw.visualization import save_figure

#: The colours of verdicts, which colour-blind readers can tell apart.
COLOURS = {
    "holds": "#009e73",
    "undecided": "#e69f00",
    "does not hold": "#d55e00",
    "not run": "#999999",
}
#: The verdicts by claim, and within it by report and data set.
Verdicts = dict[str, dict[str, dict[str, str]]]


def read(reports: Sequence[tuple[str, str]]) -> Verdicts:
    """Return the rows of all reports by claim and by report with its data set."""
    found: Verdicts = {}
    for report, file in reports:
        with Path(file).open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                of_claim = found.setdefault(row["claim"], {})
                of_claim[f"{report}, {row['data'].partition('_')[0]}"] = row
    return found


def columns(verdicts: Verdicts) -> list[str]:
    """Return the names of reports with their data sets."""
    return list(dict.fromkeys(name for of_claim in verdicts.values() for name in of_claim))


def verdict_table(verdicts: Verdicts) -> str:
    """Return the verdicts, with the figures that decide them."""
    names = columns(verdicts)
    rows = []
    for of_claim in verdicts.values():
        statement = next(iter(of_claim.values()))["statement"]
        cells = []
        for name in names:
            row = of_claim.get(name)
            told = [] if row is None else [f"**{row['verdict']}**", row["figures"]]
            cells.append(": ".join(filter(None, told)))
        rows.append([statement, *cells])
    return in_markdown(["claim", *names], rows, texts=1 + len(names))


def figure(verdicts: Verdicts) -> Figure:
    """Draw how many claims hold, by report and data set."""
    names = columns(verdicts)
    drawn = Figure(figsize=(8, 0.8 + 0.4 * len(names)), layout="constrained")
    axis = drawn.subplots()
    for row, name in enumerate(names):
        counts = Counter(of[name]["verdict"] for of in verdicts.values() if name in of)
        start = 0
        for verdict, colour in COLOURS.items():
            label = verdict if row == 0 else None
            axis.barh(row, counts[verdict], left=start, color=colour, label=label)
            if counts[verdict]:
                middle = start + counts[verdict] / 2
                axis.text(middle, row, str(counts[verdict]), ha="center", va="center")
            start += counts[verdict]
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("claims")
    drawn.legend(loc="outside lower center", ncols=len(COLOURS))
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the page on claims."""
    parser = argparse.ArgumentParser(description="Show which claims of the papers hold.")
    parser.add_argument("reports", type=named, nargs="+", help="NAME=FILE of a report (.csv)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page")
    options = parser.parse_args(argv)
    verdicts = read(options.reports)
    save_figure(figure(verdicts), options.out / "claims.png")
    picture = "![How many claims hold.](claims.png)"
    shown = {"first": f"{picture}\n\n{verdict_table(verdicts)}"}
    fill_page(options.out / "claims.md", "What do the papers' claims come to?", shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
