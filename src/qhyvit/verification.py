"""Whether the deployed model computes what the simulation says."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qhyvit.data.dataset import Dataset
from qhyvit.evaluation import Tally, opened, rounded, runner, stream
from qhyvit.quantized import QuantizedModel
from qhyvit.runtime import session
from qhyvit.targets.cpu import saturates

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Verification:
    """Simulation against runtime on the same pictures.

    Attributes:
        sqnr_db: of the runtime's logits against the simulation's, in dB, at most ±200 (200: bit for bit the same).
        top1_agreement: fraction of pictures on which both see the same class.
        max_difference: largest difference of two logits; where one is not finite, float32's largest number.
        integer_ops: computing operators that the runtime executes in integers.
        float_ops: computing operators that it executes in float.
        pictures: how many were compared.
        cpu: the processor, and whether its sums of u8×s8 products saturate.
    """

    sqnr_db: float
    top1_agreement: float
    max_difference: float
    integer_ops: int
    float_ops: int
    pictures: int
    cpu: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, rounded to 6 digits, JSON-able."""
        return rounded(asdict(self))


def verify(
    model: QuantizedModel,
    data: Dataset | str | Path | None = None,
    *,
    folder: Path | None = None,
    limit: int | None = 128,
    batch: int = 32,
) -> Verification:
    """Run simulation and real runtime on the same pictures. Labels do not matter.

    Args:
        model: what to verify.
        data: as for `evaluate`.
        folder: where the model was saved; None: it is exported to a temporary folder.
        limit: number of pictures, drawn with a fixed seed.
        batch: pictures at a time.

    Raises:
        TargetError: if the target has no runtime.
        ModelError: if `folder` lacks the exported file.
        DataError: if no picture can be read.
    """
    pictures = opened(model, data)
    tally, largest = Tally(), 0.0
    with session(model, folder) as runtime, torch.no_grad():
        simulation = runner(model.simulation())
        for item in stream(model, pictures, "Verifying", limit, batch):
            expected, found = simulation(item.images), runtime.run(item.images)
            tally.update(found, reference=expected)
            difference = (expected - found).abs().nan_to_num(_LARGEST, _LARGEST)
            largest = max(largest, float(difference.max()))
        integer_ops, float_ops = runtime.operators()
    assert tally.sqnr_db is not None
    assert tally.agreement is not None
    return Verification(
        tally.sqnr_db, tally.agreement, largest, integer_ops, float_ops, tally.pictures, processor_name()
    )


def processor_name() -> str:
    """The processor at hand, for people, such as "AMD EPYC 7B13 (u8×s8 saturates)"."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} (u8×s8 {'saturates' if saturates() else 'exact'})"
