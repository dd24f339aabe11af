"""Standard output and standard error: characters that they cannot show, and closed pipes."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import TextIO

#: The exit code after the reader of the output has closed it: that of a program that SIGPIPE ends.
CLOSED = 141


def tolerate_all_characters() -> None:
    r"""Let streams write characters that they cannot encode as escapes, such as ``\u2190``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Flush both streams now; a failure when Python exits would print a stack trace."""
    sys.stdout.flush()
    sys.stderr.flush()


def discard_unread(stream: TextIO) -> None:
    """Discard what cannot be written to a closed pipe, so that Python does not try it again."""
    try:
        stream.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
