"""Which processors saturate, from texts of /proc/cpuinfo."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from qhyvit.targets import cpu

CPUINFO = (
    "processor\t: 0\nmodel name\t: A processor\nflags\t\t: fpu sse2 avx2 {}\nbugs\t\t: spectre\n\nprocessor\t: 1\n"
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An x86 without a /proc."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "Path", lambda name: tmp_path / Path(name).name)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", True),  # Haswell to Broadwell, Zen to Zen 3
        ("avx512f avx512bw", True),  # Skylake-X
        ("avx512f avx512_vnni avx512_bf16", False),  # Cascade Lake, Zen 4
        ("avx_vnni", False),  # Alder Lake
        ("amx_tile amx_int8", False),  # Sapphire Rapids
        ("avx_vnni_int8", True),  # the name of another extension that begins the same
    ],
)
def test_flags(flags: str, expected: bool, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags))
    assert cpu.saturates() is expected


@pytest.mark.parametrize("name", ["aarch64", "arm64", "riscv64"])
def test_other_architectures_do_not(name: str, machine: pytest.MonkeyPatch) -> None:
    machine.setattr(platform, "machine", lambda: name)
    assert not cpu.saturates()


@pytest.mark.parametrize("name", ["AMD64", "x86_64", "i686"])
def test_an_x86_that_tells_nothing_is_taken_to_saturate(name: str, machine: pytest.MonkeyPatch) -> None:
    machine.setattr(platform, "machine", lambda: name)
    assert cpu.saturates()


def test_where_there_is_no_proc_torch_is_asked(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_vnni": True})
    assert not cpu.saturates()
    machine.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_vnni": False})
    assert cpu.saturates()


def test_a_cpuinfo_without_flags(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor: 0\n")
    assert cpu.saturates()
