"""Standard output and error: characters that they cannot show, and readers that have gone."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TextIO

__all__ = ["CLOSED", "closed_streams", "flush", "silence", "tolerant_streams"]

#: The exit code of a program whose reader has gone, as of one that SIGPIPE ends.
CLOSED = 141


@contextmanager
def tolerant_streams() -> Iterator[None]:
    r"""Write characters that a stream cannot encode as escapes, such as ``\u2190``."""
    changed: list[tuple[TextIOWrapper, str | None]] = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            changed.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in changed:
            stream.reconfigure(errors=errors)


def flush() -> None:
    """Write what is buffered now, since Python would tell of a failure at exit by a stack."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def closed_streams() -> list[TextIO]:
    """The standard streams that nobody reads any more, as after ``| head``."""
    return [stream for stream in (sys.stdout, sys.stderr) if _reader_has_gone(stream)]


def silence(stream: TextIO) -> None:
    """Drop what is still written to a stream."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _reader_has_gone(stream: TextIO | None) -> bool:
    if stream is None:
        return False
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # it is no file, or closed
        return False
    if sys.platform == "win32":  # which cannot ask a pipe
        return True
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
