"""Free memory: of the machine, of control groups around the process, of a CUDA allocator."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from captum_cw import ContributionWeights, TokenScores
from captum_cw._utils import memory
from captum_cw._utils.memory import cgroup_free, cuda_free, free_bytes
from support.inputs import token_ids
from support.models import llama

MB = 10**6


def group(folder: Path, limit: object, used: int, inactive: int, version: int = 2) -> None:
    """The files that the kernel shows of one control group."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\nactive_file 7\n")


def own_groups(folder: Path, *lines: str) -> Path:
    """The file that says which groups the process is in."""
    file = folder / "self_cgroup"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_the_cache_that_a_group_gives_back_is_free(tmp_path: Path) -> None:
    group(tmp_path / "job", limit=100 * MB, used=70 * MB, inactive=20 * MB)
    assert cgroup_free(own_groups(tmp_path, "0::/job"), tmp_path) == 50 * MB


def test_the_group_with_the_least_left_counts(tmp_path: Path) -> None:
    """Whether that is the process's own or one around it."""
    group(tmp_path / "outer", limit=100 * MB, used=60 * MB, inactive=0)
    group(tmp_path / "outer/inner", limit=90 * MB, used=10 * MB, inactive=0)
    group(tmp_path / "outer/other", limit=1, used=1, inactive=0)  # which it is not in
    file = own_groups(tmp_path, "0::/outer/inner")
    assert cgroup_free(file, tmp_path) == 40 * MB
    group(tmp_path / "outer/inner", limit=30 * MB, used=10 * MB, inactive=0)
    assert cgroup_free(file, tmp_path) == 20 * MB


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    group(tmp_path, limit=64 * MB, used=MB, inactive=0)
    for path in ("/", "/docker/3f2a", "/../../docker/3f2a"):
        assert cgroup_free(own_groups(tmp_path, f"0::{path}"), tmp_path) == 63 * MB


def test_groups_of_version_1_are_read(tmp_path: Path) -> None:
    group(tmp_path / "memory", limit=2**63 - 4096, used=9 * MB, inactive=0, version=1)
    group(tmp_path / "memory/slurm/job", 100 * MB, 80 * MB, 5 * MB, version=1)
    group(tmp_path / "cpu/slurm/job", 1, 1, 0, version=1)
    file = own_groups(tmp_path, "5:cpu,cpuacct:/slurm/job", "4:hugetlb,memory:/slurm/job", "0::/")
    assert cgroup_free(file, tmp_path) == 25 * MB


def test_more_than_the_limit_leaves_nothing(tmp_path: Path) -> None:
    group(tmp_path, limit=10 * MB, used=12 * MB, inactive=MB)
    assert cgroup_free(own_groups(tmp_path, "0::/"), tmp_path) == 0


@pytest.mark.parametrize("lines", [[], ["0::/job"], ["3:cpu:/job"], ["nonsense"], [""]])
def test_a_file_without_a_limit_gives_none(tmp_path: Path, lines: list[str]) -> None:
    group(tmp_path / "job", limit="max", used=MB, inactive=0)
    assert cgroup_free(own_groups(tmp_path, *lines), tmp_path) is None
    assert cgroup_free(tmp_path / "missing", tmp_path) is None


def test_free_memory_is_the_least_of_machine_and_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Machine:
        available = 500 * MB

    monkeypatch.setattr(psutil, "virtual_memory", Machine)
    monkeypatch.setattr(memory, "OWN", own_groups(tmp_path, "0::/job"))
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    cpu = torch.device("cpu")
    assert free_bytes(cpu) == 500 * MB
    group(tmp_path / "job", limit=300 * MB, used=100 * MB, inactive=0)
    assert free_bytes(cpu) == 200 * MB
    Machine.available = 150 * MB
    assert free_bytes(cpu) == 150 * MB


def test_maps_beyond_the_limit_of_a_group_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = llama(), token_ids(2, 9)
    needed = 2 * 2 * 4 * 9 * 9 * 4
    monkeypatch.setattr(memory, "OWN", own_groups(tmp_path, "0::/job"))
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    group(tmp_path / "job", limit=10 * MB, used=10 * MB - needed + 1, inactive=0)
    with pytest.raises(MemoryError, match="2 layers of 2 x 4 x 9 x 9"):
        ContributionWeights(model).attribute(ids)
    TokenScores(ContributionWeights(model)).attribute(ids)  # holds no map
    group(tmp_path / "job", limit=10 * MB, used=10 * MB - needed, inactive=0)
    assert len(ContributionWeights(model).attribute(ids)) == 2


def test_what_a_cuda_allocator_holds_and_does_not_use_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[torch.device] = []

    def of(amount: object) -> object:
        return lambda device: (asked.append(device), amount)[1]

    monkeypatch.setattr(torch.cuda, "mem_get_info", of((5 * MB, 80 * MB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", of(70 * MB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", of(40 * MB))
    device = torch.device("cuda", 1)
    assert cuda_free(device) == free_bytes(device) == 35 * MB
    assert set(asked) == {device}
