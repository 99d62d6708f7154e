"""Factor shapes of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class KronShape(NamedTuple):
    """One component `A [ma, na] kron B [mb, nb]`; `identity` names a factor that is the identity and not stored.

    identity: 0 neither, 1 `A` (then `ma == na`), 2 `B` (then `mb == nb`).
    """

    ma: int
    na: int
    mb: int
    nb: int
    identity: int = 0

    @property
    def a_numel(self) -> int:
        """Entries of A that are stored and trained."""
        return 0 if self.identity == 1 else self.ma * self.na

    @property
    def b_numel(self) -> int:
        """Entries of B that are stored and trained."""
        return 0 if self.identity == 2 else self.mb * self.nb


def flatten_shapes(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The five integers per component that the operators take."""
    return [field for shape in shapes for field in KronShape(*shape)]
