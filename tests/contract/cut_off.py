"""A process that is killed between two of its commands, for tests of what the next one makes of it."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent import run as commands


class Killed(BaseException):
    """What the code of a dead process gets instead of an answer."""


async def cut_off(monkeypatch: pytest.MonkeyPatch, before: str, work: Coroutine[Any, Any, object]) -> None:
    """Runs `work` up to the first command that begins with the words `before`; neither it nor any later one is started.

    Fails if there is no such command.
    """
    real, dead = commands._Child.run, False

    def counted(child: Any, command: Any, words: tuple[str, ...], options: Any) -> bytes:
        nonlocal dead
        dead = dead or " ".join([Path(str(command)).name, *words]).startswith(before)
        if dead:
            raise Killed
        return real(child, command, words, options)

    with monkeypatch.context() as patch:
        patch.setattr(commands._Child, "run", counted)
        with pytest.raises(Killed):
            await work
