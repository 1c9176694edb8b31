"""Named things of one kind: methods, quantizers, targets, range settings."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from qhyvit.errors import QhyvitError

T = TypeVar("T")


class Registry(Generic[T]):
    """A typed dictionary that refuses duplicates and explains a typo.

    Args:
        kind: what the entries are, singular, for messages ("method").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: enter the decorated object under `name`.

        Raises:
            ValueError: if the name is taken.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise QhyvitError(f"No {self.kind} is called {name!r}.{hint} Known: {', '.join(self)}.")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def items(self) -> list[tuple[str, T]]:
        """Name and entry, sorted by name."""
        return sorted(self._entries.items())
