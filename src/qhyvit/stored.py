"""Modules that a result folder keeps: a kind, JSON-able fields, and buffers; nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn


class Stored(nn.Module):
    """A module whose constructor takes its buffers and its fields by name.

    Attributes:
        kind: its name in its registry.
        fields: names of the attributes that are not tensors; their values are JSON-able.
    """

    kind: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()

    def spec(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-able; `from_spec` takes it back."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.fields}}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], /, **tensors: Tensor) -> Self:
        """The module that `spec()` and `state_dict()` describe.

        Raises:
            ValueError: if `spec` is of another kind, or its keys are not those of `spec()`.
        """
        fields = dict(spec)
        if fields.pop("kind", None) != cls.kind or fields.keys() != set(cls.fields):
            raise ValueError(f"not the specification of a {cls.kind} one: {dict(spec)}")
        return cls(**tensors, **fields)

    def extra_repr(self) -> str:
        return ", ".join([self.kind, *(f"{name}={getattr(self, name)}" for name in self.fields)])
