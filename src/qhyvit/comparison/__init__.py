"""Models × methods × widths × scopes × seeds in one table."""

from qhyvit.comparison.grid import Cell, Variant, ablation
from qhyvit.comparison.run import compare
from qhyvit.comparison.table import Comparison, Outcome

__all__ = ["Cell", "Comparison", "Outcome", "Variant", "ablation", "compare"]
