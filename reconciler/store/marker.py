"""Remembers beside the store which cluster a data folder belongs to, so that a lost store is never taken for a new cluster.

Called by the composition root around the opening of the store. A new cluster would take every VM on the hosts for a stranger.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from reconciler.store.database import StoreCorrupt, StoreUnavailable
from specs.names import ClusterId

STORE = "muster.db"
MARKER = "cluster-id"


def check_marker(folder: Path) -> None:
    """Raises StoreCorrupt if the store is missing or empty in a folder that had one; changes nothing."""
    store, marker = folder / STORE, folder / MARKER
    size = store.stat().st_size if store.exists() else -1
    if size > 0:
        return
    log = store.with_name(f"{STORE}-wal")
    if not marker.exists() and not (size == 0 and log.exists() and log.stat().st_size):
        return
    what = "is empty" if size == 0 else "is missing"
    raise StoreCorrupt(
        f"{store} {what}, but this folder holds a cluster{_told(marker)}; restore {STORE} from a backup, or remove "
        f"{marker} and {STORE}* to begin a new cluster, to which everything that runs on the hosts is unknown; "
        "nothing was changed"
    )


def _told(marker: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return f" ({marker.read_text().strip()[:40]})"
    return ""


def write_marker(folder: Path, cluster: ClusterId) -> None:
    """Makes the marker durable; one that is right already is left alone. Raises StoreUnavailable."""
    marker = folder / MARKER
    try:
        if marker.exists() and marker.read_text() == f"{cluster}\n":
            return
        temporary = marker.with_name(f".{MARKER}.tmp")
        with temporary.open("w") as file:
            file.write(f"{cluster}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(marker)
    except (OSError, UnicodeDecodeError) as error:
        raise StoreUnavailable(f"{marker} cannot be written: {error}") from error
