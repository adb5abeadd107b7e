"""The keeper of one VM: a small process of its own that runs the VM's main command and outlives every agent.

Started by kept.py as `python -m agent.engines.keeper FOLDER`. It does what only a parent can do: it starts the command again
when the guest reboots, knows its exit status, and frees what the VM holds as soon as it ends. In FOLDER:

keeper.json  what to do, a `Plan`
main.json    identity of the main command while it runs
exit.json    {"status": int, "failed": str}, written last: status of the main command, -N for signal N; or `failed` names the
             loading command whose status it is
console.log  what the commands say; bounded, with console.log.1 before it
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.identity import identify

PLAN, MAIN, EXIT, ASKED = "keeper.json", "main.json", "exit.json", "asked-stop"
CONSOLE, CONSOLE_OLD = "console.log", "console.log.1"
CONSOLE_MAX = 4 * 1024 * 1024  # bytes; the file before it is kept too
NOT_STARTED = 127
_SHORT_LIFE = 2.0  # seconds; a guest that reboots faster is started again more slowly


@dataclass(frozen=True, slots=True)
class Plan:
    """What a keeper does: `clean`, `load`, `main`, as long as `main` ends with one of `again`; at the end `clean`.

    Every command is an argv. Of `clean` a failure means that there was nothing to clean; of `load` it is the end. Where the VM
    was never started before, `is_first`, there is nothing to clean at first.
    """

    main: tuple[str, ...]
    load: tuple[tuple[str, ...], ...] = ()
    clean: tuple[tuple[str, ...], ...] = ()
    again: tuple[int, ...] = ()
    is_first: bool = False

    def to_json(self) -> str:
        """As `keeper.json` holds it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote."""
        value = json.loads(text)
        return Plan(
            main=tuple(value["main"]),
            load=tuple(map(tuple, value["load"])),
            clean=tuple(map(tuple, value["clean"])),
            again=tuple(value["again"]),
            is_first=bool(value["is_first"]),
        )


def keep(folder: Path) -> None:
    """Carries out the plan of a VM's folder; returns when the VM has ended. Blocks."""
    plan = Plan.from_json((folder / PLAN).read_text())
    terminal, console = os.openpty()
    threading.Thread(target=_log, args=(terminal, folder / CONSOLE, folder / CONSOLE_OLD), daemon=True).start()
    if not plan.is_first:
        _clean(plan)
    while True:
        began = time.monotonic()
        status, failed = _round(plan, folder, console)
        if failed or status not in plan.again or (folder / ASKED).exists():
            break
        _clean(plan)
        time.sleep(max(0.0, _SHORT_LIFE - (time.monotonic() - began)))
    _clean(plan)
    _write(folder / EXIT, {"status": status, "failed": failed})
    (folder / MAIN).unlink(missing_ok=True)


def _round(plan: Plan, folder: Path, console: int) -> tuple[int, str]:
    """The exit status of the main command, or of the loading command that failed, and then its name."""
    for argv in plan.load:
        status = _wait(_spawn(argv, console))
        if status:
            return status, argv[0]
    pid = _spawn(plan.main, console)
    record = identify(pid) if pid else None
    if record is not None:
        _write(folder / MAIN, asdict(record))
    return _wait(pid), ""


def _clean(plan: Plan) -> None:
    with open(os.devnull, "r+b", 0) as nowhere:  # noqa: PTH123
        for argv in plan.clean:
            _wait(_spawn(argv, nowhere.fileno()))


def _spawn(argv: tuple[str, ...], output: int) -> int:
    """Starts a command with `output` as its terminal; returns its pid, 0 if it cannot be started."""
    # A handler set to ignore is inherited, and a guest's SIGTERM is its power button.
    defaults = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    files = [(os.POSIX_SPAWN_DUP2, output, number) for number in (0, 1, 2)]
    try:
        return os.posix_spawnp(argv[0], argv, os.environ, file_actions=files, setsigdef=defaults)
    except OSError as error:
        os.write(output, f"{argv[0]} cannot be started: {error.strerror}\n".encode())
        return 0


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else NOT_STARTED


def _log(terminal: int, path: Path, old: Path) -> None:
    """Copies what the terminal shows into the log, for ever."""
    size = path.stat().st_size if path.exists() else 0
    with contextlib.suppress(OSError):  # the terminal's other side is closed, or the folder is gone
        while data := os.read(terminal, 65536):
            if size > CONSOLE_MAX:
                path.replace(old)
                size = 0
            # A full disk costs lines of the log, never the VM: whoever does not read holds the guest up.
            with contextlib.suppress(OSError), path.open("ab") as file:
                size += file.write(data)


def _write(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(OSError):  # the folder may be gone; the host is cleaned all the same
        temporary.write_text(json.dumps(value))
        temporary.replace(path)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # The host's shutdown tells every process to end; the keeper ends with its VM, to say how.
        signal.signal(number, signal.SIG_IGN)
    keep(Path(sys.argv[1]))
