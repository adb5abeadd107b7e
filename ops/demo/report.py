"""Says what is going on, and keeps what was done with its seconds for the table at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Step:
    """One row: what was done, how it went in a few words, how long it took."""

    name: str
    seconds: float = 0.0
    outcome: str = ""


@dataclass
class Report:
    """The rows so far; those of the shell part come first."""

    rows: list[Step] = field(default_factory=list)

    @classmethod
    def begun_by_shell(cls) -> Report:
        """With the rows that ops/up hands over in MUSTER_SETUP (`NAME=MILLISECONDS …`)."""
        words = [word.partition("=") for word in os.environ.get("MUSTER_SETUP", "").split()]
        return cls([Step(name, int(millis) / 1000, "ready") for name, _, millis in words if millis.isdigit()])

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Announces a step, and says afterwards what `outcome` was set to. A step that fails is no row."""
        print(f"==> {name}", flush=True)
        step = Step(name)
        began = time.monotonic()
        yield step
        step.seconds = time.monotonic() - began
        self.rows.append(step)
        print(f"    {step.outcome or 'done'} ({step.seconds:.1f} s)", flush=True)

    def table(self) -> str:
        """The rows as aligned text, with their sum."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{row.seconds:7.1f} s  {row.name:{width}}  {row.outcome}".rstrip() for row in self.rows]
        return "\n".join([*lines, f"{sum(row.seconds for row in self.rows):7.1f} s  in all"])
