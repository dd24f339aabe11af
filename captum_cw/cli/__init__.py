"""The command line: ``captum-cw attribute``, ``evaluate``, ``reproduce``, ``models`` and ``demo``.

:mod:`captum_cw.cli.parsing` has all options. Each command has a module of its own, which is
imported only when the command runs, because it imports torch.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from typing import Any

from captum_cw.cli.answer import as_json
from captum_cw.cli.parsing import UsageError, parser
from captum_cw.cli.streams import CLOSED, discard_unread, flush, tolerate_all_characters

__all__ = ["VERSION", "main", "parser"]

#: The version of the JSON documents.
VERSION = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The arguments of the program; None reads them from the shell.

    Returns:
        The exit code: 0 for success, 1 for a failure (reported in one line on standard error), 130
        if the run was interrupted, 141 if the reader of the output has closed it, as in ``| head``.

    Raises:
        SystemExit: With code 2 for wrong usage, and code 0 after ``--help`` or ``--version``.

    Example:
        >>> main(["attribute", "--model", "no/such.gguf", "--text", "Ice is cold"])
        1
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    tolerate_all_characters()
    try:
        try:
            return _parse_and_run(given)
        finally:
            flush()
    except BrokenPipeError:
        discard_unread(sys.stdout)
        discard_unread(sys.stderr)
        return CLOSED


def _parse_and_run(given: list[str]) -> int:
    try:
        return _run(parser().parse_args(given))
    except UsageError as error:
        program = error.parser.prog
        _report(error, f"{program}: error: {error}", "--json" in given)
        print(f"Run {program} --help to see all options and examples.", file=sys.stderr)
        raise SystemExit(2) from None


def _run(options: Namespace) -> int:
    try:
        command = import_module(f"captum_cw.cli.{options.command}")
        # With --json, standard output must not contain what libraries print.
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            answer = command.run(options)
    except UsageError:
        raise
    except KeyboardInterrupt as error:
        _report(error, "Interrupted.", options.json)
        return 130
    except Exception as error:
        if options.debug:
            raise
        _report(error, f"{options.parser.prog}: error: {_message_of(error)}", options.json)
        return 1
    if answer is not None:  # otherwise another process of the same run prints the answer
        if options.json:
            _print_json(answer.document)
        else:
            answer.show()
    return 0


def _report(error: BaseException, line: str, json: bool) -> None:
    print(line, file=sys.stderr)
    if json and os.environ.get("RANK", "0") == "0":  # only one process of a run prints JSON
        _print_json({"error": _message_of(error), "type": type(error).__name__})


def _message_of(error: BaseException) -> str:
    """Return the message of an error in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"There is no {error.filename}."
    return " ".join(str(error).split()) or type(error).__name__


def _print_json(document: dict[str, Any]) -> None:
    print(as_json({"version": VERSION, **document}))
