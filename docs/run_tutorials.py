"""Run the tutorials, and write them with their outputs as pages, ``docs/tutorials/*.md``.

The notebooks are kept without outputs, and the site does not run them. When notebooks have changed,
run ``python docs/run_tutorials.py``, or ``python docs/run_tutorials.py 03`` for one of them. Each
takes some minutes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "tutorials"


def executed(path: Path) -> Any:
    """Run a notebook, and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    return notebook


def tidied(notebook: Any) -> Any:
    """Remove progress bars and warnings from the outputs, and simplify their HTML."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            # The pages are in another folder than the notebooks.
            cell.source = cell.source.replace("](../docs/", "](../")
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            data = output.get("data", {})
            html = data.get("text/html", "")
            if 'class="dataframe"' in html:
                del data["text/html"]
            elif html.startswith("<style"):  # a styled table, which has random names
                data["text/html"] = re.sub(r'(?s)<style.*?</style>| (?:id|class)="[^"]*"', "", html)
            elif html.startswith("<iframe"):  # in Markdown, a blank line would end it
                data["text/html"] = html.replace("\n", "&#10;")
            elif "<body>" in html:  # a whole page, whose style would change the site
                data["text/html"] = re.sub(r"(?s)^.*<body>|</body>.*$", "", html)
    return notebook


def write_page(notebook: Any, name: str) -> None:
    """Write a notebook as Markdown, and its pictures in a folder next to it."""
    pictures = {"output_files_dir": f"{name}_files"}
    page, resources = MarkdownExporter().from_notebook_node(notebook, resources=pictures)
    (FOLDER / f"{name}_files").mkdir(parents=True, exist_ok=True)
    for old in (FOLDER / f"{name}_files").iterdir():
        old.unlink()
    for picture, content in resources["outputs"].items():
        (FOLDER / picture).write_bytes(content)
    page = page.replace("![png]", "![What the cell draws]").strip() + "\n"
    (FOLDER / f"{name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    for path in sorted((ROOT / "tutorials").glob(f"{''.join(sys.argv[1:])}*.ipynb")):
        print(path.stem)
        write_page(tidied(executed(path)), path.stem)
