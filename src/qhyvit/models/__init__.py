"""Models by name: the net that ships with the package, timm's, and the user's own."""

from qhyvit.models.load import LoadedModel, list_models, load_model

__all__ = ["LoadedModel", "list_models", "load_model"]
