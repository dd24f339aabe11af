"""The free memory of a device, and Python's garbage collector.

A call that knows the free memory can refuse to run instead of being killed.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

__all__ = ["cgroup_free", "collection_paused", "cuda_free", "free_bytes"]

#: The file that lists a process's control groups, and the folder of all control groups.
OWN, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

#: For each version of control groups: the folder of memory files below :data:`ROOT`, the files with
#: the limit and the usage, and the statistic of used memory that the kernel can reclaim.
FILES = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause Python's garbage collector, which searches for cycles of unused objects.

    It starts again and again while many new objects are made, such as the hooks of a model or the
    records of a pass, although all of them are in use. From time to time it looks through all
    objects of the process, which takes longer than a pass over a short text.

    Example:
        >>> import gc
        >>> with collection_paused():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def free_bytes(device: torch.device) -> int:
    """Return the number of bytes that can be allocated on a device now.

    On the CPU, this is the machine's available memory, bounded by the limits of the process's
    control groups, such as those of a container or a batch job.

    Example:
        >>> free_bytes(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return cuda_free(device)
    available, limited = psutil.virtual_memory().available, cgroup_free(OWN, ROOT)
    return available if limited is None else min(available, limited)


def cuda_free(device: torch.device) -> int:
    """Return the driver's free memory plus the unused memory of PyTorch's allocator."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def cgroup_free(own: Path, root: Path) -> int | None:
    """Return the bytes that the limits of a process's control groups leave.

    Args:
        own: The file that lists the process's groups.
        root: The folder of all groups.

    Returns:
        The minimum over the groups and their outer groups; None without a limit or without control
        groups.

    Example:
        >>> cgroup_free(Path("/nowhere"), Path("/nowhere")) is None
        True
    """
    return min(_free_by_group(own, root), default=None)


def _free_by_group(own: Path, root: Path) -> Iterator[int]:
    # Lines are "0::/path" in version 2, and "number:controllers:/path" in version 1.
    for controllers, path in re.findall("^[0-9]+:(.*?):(.*)$", _read_text(own), re.MULTILINE):
        if controllers and "memory" not in controllers.split(","):
            continue
        place, limit, used, inactive = FILES[1 if controllers else 2]
        # Inside a container, paths of groups outside of it start with "..".
        group = Path(*(part for part in Path(path).parts if part not in ("/", "..")))
        for outer in (group, *group.parents):  # the limit of a group also holds for inner groups
            folder = root / place / outer
            most, now = _read_number(folder / limit), _read_number(folder / used)
            if most is not None and now is not None:
                yield max(0, most - now + (_read_number(folder / "memory.stat", inactive) or 0))


def _read_text(file: Path) -> str:
    """Read a file; return "" if it cannot be read."""
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


def _read_number(file: Path, name: str = "") -> int | None:
    """Read a number, after a name; return None if the file is unreadable or says "max"."""
    match = re.search(rf"^{name}\s*(\d+)$", _read_text(file), re.MULTILINE)
    return int(match[1]) if match else None
