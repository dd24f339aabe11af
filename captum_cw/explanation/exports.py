"""What an explanation is saved as and converted to: files, the page, pandas and xarray."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from captum_cw._utils.files import whole_file
from captum_cw.explanation import files

if TYPE_CHECKING:
    from pandas import DataFrame
    from typing_extensions import Self
    from xarray import Dataset

    from captum_cw.explanation.explanation import Explanation

__all__ = ["Exported"]


class Exported:
    """The exports of :class:`captum_cw.Explanation`, which is the only class that derives it."""

    @property
    def _whole(self) -> Explanation:
        return cast("Explanation", self)

    def save(self, path: str | Path) -> None:
        """Save a file of the kind that its ending names.

        ``.safetensors`` (or no ending) holds everything, and :meth:`load` reads it again.
        ``.html`` is :meth:`page`, and ``.json`` is :meth:`to_json`. The same explanation gives the
        same bytes.

        Args:
            path: The file, such as ``"text.safetensors"``.

        Raises:
            TypeError: If ``settings`` hold something that JSON cannot.
            ValueError: If the file has another ending.

        Example:
            >>> path = getfixture("tmp_path") / "text.safetensors"
            >>> explain(model, tokenizer, "Ice is cold").save(path)
            >>> Explanation.load(path).tokens
            [' Ice', ' is', ' cold']
        """
        match Path(path).suffix.lower():
            case ".safetensors" | "":
                files.save(path, self._whole)
            case ".html" | ".htm":
                self.save_page(path)
            case ".json":
                with whole_file(path) as whole:
                    whole.write_text(self.to_json() + "\n", encoding="utf-8")
            case suffix:
                raise ValueError(
                    f"path={str(path)!r} ends in {suffix!r}: an explanation is saved as "
                    ".safetensors, .html or .json."
                )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a safetensors file of :meth:`save`, bit for bit. Files cannot run code.

        Args:
            path: The file.

        Raises:
            ValueError: If the file is damaged, of another kind, or of an unknown version.
        """
        return cast("Self", files.load(path, cast("type[Explanation]", cls)))

    def page(self, *, sinks: Collection[int] | None = None) -> str:
        """Return a self-contained, interactive HTML page.

        Args:
            sinks: Positions that the page's colour scale can ignore; None for :attr:`sinks`.

        Raises:
            ValueError: See :func:`captum_cw.explanation.page.explanation_page`.

        Example:
            >>> explain(model, tokenizer, "Ice is cold").page().startswith("<!DOCTYPE html>")
            True
        """
        from captum_cw.explanation.page import explanation_page

        return explanation_page(self._whole, sinks=sinks)

    def save_page(self, path: str | Path, *, sinks: Collection[int] | None = None) -> None:
        """Save :meth:`page` to a file.

        Args:
            path: The file, usually ending in ``.html``.
            sinks: See :meth:`page`.

        Raises:
            ValueError: See :func:`captum_cw.explanation.page.explanation_page`.

        Example:
            >>> path = getfixture("tmp_path") / "page.html"
            >>> explain(model, tokenizer, "Ice is cold").save_page(path)
        """
        with whole_file(path) as whole:
            whole.write_text(self.page(sinks=sinks), encoding="utf-8")

    def _repr_html_(self) -> str:
        """Return the page in a frame, for notebooks."""
        from captum_cw.explanation.page import framed

        return framed(self.page(), f"{self!r} Trust this notebook, or run it, to see the page.")

    def to_dict(self, *, maps: bool = False) -> dict[str, Any]:
        """Return tokens, scores, shares, predictions and settings as lists, numbers and strings.

        The shares of a method are those of :meth:`~captum_cw.Explanation.shares`: one for each
        word.

        Args:
            maps: Whether to include the maps, whose size grows with the square of the text.

        Example:
            >>> found = explain(model, tokenizer, "Ice is cold").to_dict()
            >>> found["tokens"]
            [' Ice', ' is', ' cold']
            >>> found["shares"]["contribution"][0].keys()
            dict_keys(['word', 'place', 'share', 'sink'])
        """
        return files.to_dict(self._whole, maps=maps)

    def to_json(self, *, maps: bool = False) -> str:
        """Return :meth:`to_dict` as JSON.

        Raises:
            TypeError: If ``settings`` hold something that JSON cannot.

        Example:
            >>> Explanation(["Ice"], {"contribution": torch.ones(1)}).to_json()
            '{"tokens": ["Ice"], "scores": {"contribution": [1.0]}, "shares": {"contribution": \
[{"word": "Ice", "place": 0, "share": 1.0, "sink": false}]}, "settings": {}}'
        """
        return files.to_json(self._whole, maps=maps)

    def to_dataframe(self, of: Literal["scores", "maps"] = "scores") -> DataFrame:
        """Return a pandas table with one column per method.

        Args:
            of: ``"scores"`` for one row per token, with its ``place``, its text (``token``), and
                its ``word`` with the ``word_number`` if words are known. ``"maps"`` for one row per
                pair of query and token, with the positions (``query``, ``place``) and texts
                (``query_token``, ``token``) of both. In an explanation by word, span or message,
                the columns of texts are called ``word``, ``span`` or ``message``.

        Raises:
            ImportError: If pandas is not installed.
            ValueError: If ``of`` is unknown, or a method has the name of one of these columns.

        Example:
            >>> explain(model, tokenizer, "Ice is cold").to_dataframe().columns[:5].tolist()
            ['place', 'token', 'word', 'word_number', 'target']
        """
        return files.to_dataframe(self._whole, of)

    def to_xarray(self) -> Dataset:
        """Return an xarray data set with named dimensions.

        ``scores`` is ``(measure, key)`` and ``maps`` is ``(measure, query, key)``, with NaN for
        methods without one. ``head_key``, ``attention``, ``relative_norm`` and ``cosine`` are
        ``(layer, head, query, rank)``, most important key first; ``share`` is ``(layer, head,
        query)``, ``effect`` is ``(layer, head)`` and ``output_norm`` is ``(layer, query)``.
        Layers with fewer heads than others are filled with NaN, and with -1 in ``head_key``.
        Tokens, words, queries, predictions and layer names are coordinates, and settings are
        attributes.

        Raises:
            ImportError: If xarray is not installed.

        Example:
            >>> dict(explain(model, tokenizer, "Ice is cold").to_xarray().sizes)
            {'measure': 7, 'key': 3, 'query': 3, 'layer': 2, 'head': 4, 'rank': 3}
        """
        return files.to_xarray(self._whole)
