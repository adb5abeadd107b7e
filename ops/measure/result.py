"""One line of the bench's table, and what every measurement is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Plan:
    """Where files go, and whether sizes are cut down to a tenth to see that everything works."""

    folder: Path
    quick: bool = False

    def size(self, full: int, quick: int | None = None) -> int:
        """A number of things to do."""
        return full if not self.quick else quick if quick is not None else max(1, full // 10)

    def fresh(self, name: str) -> Path:
        """A new folder."""
        number = sum(1 for _ in self.folder.glob(f"{name}-*"))
        folder = self.folder / f"{name}-{number}"
        folder.mkdir()
        return folder


@dataclass(frozen=True, slots=True)
class Check:
    """One goal: `value` must be at most (`<=`) or at least (`>=`) `goal`."""

    name: str
    value: float
    sign: str
    goal: float

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.value <= self.goal if self.sign == "<=" else self.value >= self.goal

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} {self.sign} {self.goal:g}"


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured; units are in the figures' names."""

    metric: str
    what: str
    figures: dict[str, float]
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """For `-o json`."""
        return asdict(self) | {"checks": [asdict(check) | {"met": check.met} for check in self.checks]}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]
