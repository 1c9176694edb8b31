"""What can go wrong, in one sentence a person can act on.

Every error that is the user's to mend derives from `QhyvitError`; the command line prints its message alone, without
a stack trace, and exits with code 2. A message names the file, layer or option, says why, and says what to do.
"""

from __future__ import annotations


class QhyvitError(Exception):
    """Base of all errors whose message is written for the user."""


class DataError(QhyvitError):
    """Pictures or labels that cannot be used as asked."""


class ModelError(QhyvitError):
    """A model that cannot be built or its weights not loaded."""


class CaptureError(QhyvitError):
    """A model that cannot be captured as a graph."""


class RecipeError(QhyvitError):
    """A recipe with an unknown key or a value out of range."""


class TargetError(QhyvitError):
    """A model that a target cannot execute as asked."""
