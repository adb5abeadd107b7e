"""Which environments have outlived their lifetime. Wall time; a clock that jumps must not delete anything."""

from __future__ import annotations

from collections.abc import Iterable

from reconciler.core.model import EnvIntent
from specs.names import EnvId

MAX_JUMP = 600  # seconds the wall clock may run ahead of the monotonic one between two looks before expiry pauses


def clock_jumped(wall_passed: float, monotonic_passed: float) -> bool:
    """True if the wall clock moved forward by over MAX_JUMP seconds more than time really passed."""
    return wall_passed - monotonic_passed > MAX_JUMP


def expired(envs: Iterable[EnvIntent], now: int) -> tuple[EnvId, ...]:
    """Environments whose lifetime is over and that are not being deleted yet, in id order."""
    return tuple(sorted(env.id for env in envs if 0 < env.expires_at <= now and not env.deleting))
