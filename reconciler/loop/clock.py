"""The clocks of the loop, in one place so that a test or a simulation can turn them."""

from __future__ import annotations

import asyncio
import time


class Clock:
    """Wall time for lifetimes, monotonic time for back-off and heartbeats."""

    def wall(self) -> float:
        """Unix seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds of the running loop's clock, which never jumps."""
        return asyncio.get_running_loop().time()
