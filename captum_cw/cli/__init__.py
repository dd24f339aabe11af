"""The command line: ``captum-cw attribute``, ``evaluate``, ``reproduce``, ``models`` and ``demo``.

:mod:`captum_cw.cli.parsing` says what can be typed, and a module for each command does it; that
one, and with it torch, is imported only then.
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
from captum_cw.cli.problems import message_of
from captum_cw.cli.streams import CLOSED, closed_streams, flush, silence, tolerant_streams

__all__ = ["VERSION", "main", "parser"]

#: Of the form of JSON documents.
VERSION = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What follows the program's name; None takes them from the shell.

    Returns:
        The exit code: 0, 1 for a failure, of which one line on standard error tells, 130 where
        the run was interrupted, or 141 where nobody reads its output any more, as after ``| head``.

    Raises:
        SystemExit: With code 2 for wrong usage, with 0 after ``--help`` or ``--version``.

    Example:
        >>> main(["attribute", "--model", "no/such.gguf", "--text", "Hello"])
        1
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    with tolerant_streams():
        try:
            try:
                return _parsed_and_run(given)
            finally:
                flush()
        except BrokenPipeError:
            closed = closed_streams()
            for stream in closed:
                silence(stream)
            if not closed:  # it was another pipe
                raise
            return CLOSED


def _parsed_and_run(given: list[str]) -> int:
    try:
        return _run(parser().parse_args(given))
    except UsageError as error:
        _tell(error, f"{error.of.prog}: error: {error}", "--json" in given)
        print(f"{error.of.prog} --help shows all options, and examples.", file=sys.stderr)
        raise SystemExit(2) from None


def _run(options: Namespace) -> int:
    try:
        command = import_module(f"captum_cw.cli.{options.command}")
        # What libraries may print would be no JSON.
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            answer = command.run(options)
        if answer is not None and not options.json:  # None: another process tells
            answer.show()
    except UsageError:
        raise
    except KeyboardInterrupt as error:
        _tell(error, "Interrupted.", options.json)
        return 130
    except Exception as error:  # whatever fails: a person wants its message, not our stack
        if options.debug or (isinstance(error, BrokenPipeError) and closed_streams()):
            raise
        _tell(error, f"{options.parser.prog}: error: {message_of(error)}", options.json)
        return 1
    if answer is not None and options.json:
        _print_json(answer.document)
    return 0


def _tell(error: BaseException, line: str, json: bool) -> None:
    print(line, file=sys.stderr)
    if json and os.environ.get("RANK", "0") == "0":  # one of several processes
        _print_json({"error": message_of(error), "type": type(error).__name__})


def _print_json(document: dict[str, Any]) -> None:
    print(as_json({"version": VERSION, **document}))
