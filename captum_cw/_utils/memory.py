"""How much memory is free, for those who would rather refuse than be killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

__all__ = ["cgroup_free", "cuda_free", "free_bytes"]

#: Which control groups a process is in, and where the kernel shows them.
OWN, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

#: By version of control groups: where the files of memory are below :data:`ROOT`, the limit, what
#: is used, and what of that the kernel gives back when it is asked for.
FILES = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}


def free_bytes(device: torch.device) -> int:
    """The bytes that can be allocated on a device now.

    On the CPU that is what the machine has available, and no more than what the control groups of
    the process, such as those of a container or a batch job, leave of their limits.

    Example:
        >>> free_bytes(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return cuda_free(device)
    available, limited = psutil.virtual_memory().available, cgroup_free(OWN, ROOT)
    return available if limited is None else min(available, limited)


def cuda_free(device: torch.device) -> int:
    """What the driver has, and what PyTorch's allocator holds and does not use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def cgroup_free(own: Path, root: Path) -> int | None:
    """The least that a control group of this process, or one around it, leaves of its limit.

    Args:
        own: The file that tells which groups the process is in.
        root: The folder that holds the groups.

    Returns:
        Bytes; None where no group has a limit, or the system has no control groups.

    Example:
        >>> cgroup_free(Path("/nowhere"), Path("/nowhere")) is None
        True
    """
    return min(_left(own, root), default=None)


def _left(own: Path, root: Path) -> Iterator[int]:
    for version, group in _groups(_text(own)):
        place, limit, used, inactive = FILES[version]
        for outer in (group, *group.parents):  # each group bounds those inside of it
            folder = root / place / outer
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None:
                yield max(0, most - now + _counted(folder / "memory.stat", inactive))


def _groups(own: str) -> Iterator[tuple[int, Path]]:
    """The version and the path, below the folder of all groups, of those that bound memory.

    Lines are ``0::/path`` in version 2, and ``number:controllers:/path`` in version 1.
    """
    for line in own.splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        # Seen from inside a container, what lies outside of it begins with "..".
        group = Path(*(part for part in Path(path).parts if part not in ("/", "..")))
        if number == "0" and not controllers:
            yield 2, group
        elif "memory" in controllers.split(","):
            yield 1, group


def _text(file: Path) -> str:
    """Nothing where it cannot be read."""
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    """None where it cannot be read, or says "max"."""
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _counted(file: Path, name: str) -> int:
    lines = (line.split() for line in _text(file).splitlines())
    return next((int(line[1]) for line in lines if line[:1] == [name]), 0)
