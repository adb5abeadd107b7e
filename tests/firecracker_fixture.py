"""The real Firecracker for tests: on PATH, or where ops/test leaves it."""

from __future__ import annotations

import shutil

from agent.images.recipe import default_cache


def firecracker_binary() -> str:
    """The path of `firecracker`, with its jailer beside it; a test without it fails."""
    found = shutil.which("firecracker", path=str(default_cache() / "firecracker")) or shutil.which("firecracker")
    assert found, "firecracker is not here; ops/test fetches it"
    return found
