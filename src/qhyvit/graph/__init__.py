"""The captured graph: capture, normalising passes, sites, bridges."""

from qhyvit.graph.capture import capture

__all__ = ["capture"]
