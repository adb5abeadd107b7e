"""The end of the console logs that engines keep as files. Blocks for one small read."""

from __future__ import annotations

import os
from pathlib import Path


def last_bytes(limit: int, *newest_first: Path) -> bytes:
    """At most `limit` bytes from the end of the files taken together; files that are not there count as empty."""
    found = b""
    for path in newest_first:
        try:
            with path.open("rb") as file:
                wanted = limit - len(found)
                file.seek(max(0, file.seek(0, os.SEEK_END) - wanted))
                found = file.read(wanted) + found
        except FileNotFoundError:
            continue
        if len(found) >= limit:
            break
    return found
