"""The colours of signs, which colour-blind readers can tell apart.

They mean the same in figures, in the terminal and on the page of an explanation, whose style sheet
has hues of its own for its two themes. The curves of measures have other colours.
"""

from __future__ import annotations

__all__ = ["AGAINST", "TOWARDS"]

#: Blue: for a target, or positive. Red, green and blue from 0 to 255.
TOWARDS = (0, 114, 178)
#: Orange: against a target, or negative.
AGAINST = (213, 94, 0)
