"""Zero points that overflow, against the definition z = q_min - round(r_min / s)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.test_qhyvit import problem

from qhyvit.calibration.overflow import count_overflows
from qhyvit.quantizers.uniform import overflows


@given(st.floats(-50, 50), st.floats(0.01, 20), st.integers(2, 8))
def test_it_is_where_the_zero_point_is_no_code(low: float, width: float, bits: int) -> None:
    high, top = low + width, 2**bits - 1
    zero_point = -low / (width / top)
    near = min(abs(zero_point + 0.5), abs(zero_point - top - 0.5)) < 1e-3  # a tie may go either way
    found = bool(overflows(torch.tensor(low).double(), torch.tensor(high).double(), bits))
    assert near or found == (not 0 <= round(zero_point) <= top)


def test_a_shifted_layer_is_counted_channel_by_channel() -> None:
    case = problem("w8a8")
    case.per_channel = True
    stem = next(n for n in case.graph.graph.nodes if "stem" in n.name and n.op == "call_function")
    bias = getattr(case.graph, str(stem.args[2].target))
    before = count_overflows(case).channels()
    bias[:5] += 50.0
    case.refresh()
    after = count_overflows(case)
    row = next(s for s in after.sites if s.value == stem.name)
    assert (row.channels, row.overflowing >= 5, row.tensor) == (16, True, False)
    assert after.channels() >= before + 5
