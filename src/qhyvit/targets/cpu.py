"""What the processor at hand does with 8-bit products."""

from __future__ import annotations

import platform
from pathlib import Path


def saturates() -> bool:
    """Whether sums of two u8×s8 products saturate at 16 bits on this processor.

    True for x86 without VNNI (AVX2's vpmaddubsw); false for x86 with AVX-512 VNNI, AVX-VNNI or AMX, and for all
    others. Where it cannot be told, an x86 processor is taken to saturate: the safe export is right everywhere.
    """
    if platform.machine().lower() not in {"x86_64", "amd64", "i386", "i686", "x86"}:
        return False
    return not ({"avx512_vnni", "avx_vnni", "amx_int8"} & _flags())


def _flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return _flags_from_torch()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def _flags_from_torch() -> set[str]:
    """Where there is no /proc (Windows, macOS on x86), ask torch, whose newer versions list the capabilities."""
    import torch

    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return {name for name, value in capabilities.items() if value is True}
