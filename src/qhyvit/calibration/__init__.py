"""Calibration: what is kept of each tensor while pictures stream by, and the ranges chosen from it."""

from __future__ import annotations

from qhyvit.calibration.ranges import RANGES, RangeOptions, RangeSetting, weight_range
from qhyvit.calibration.statistics import TensorStatistics

__all__ = ["RANGES", "RangeOptions", "RangeSetting", "TensorStatistics", "weight_range"]
