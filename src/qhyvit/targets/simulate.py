"""The target that is no runtime: everything the quantizers can express is allowed, nothing is exported."""

from __future__ import annotations

from qhyvit.targets.base import Target

SIMULATE = Target(
    name="simulate",
    description="fake quantization in PyTorch; allows everything, exports nothing",
)
