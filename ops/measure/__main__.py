"""The bench's command line. Started by `ops/bench`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import orjson

from ops.measure import fleets, parts
from ops.measure.result import Plan, Result
from specs.logs import set_up_logs

METRICS: dict[str, Callable[[Plan], Coroutine[Any, Any, Result]]] = {
    "P1": fleets.p1,
    "P2": fleets.p2,
    "P4": fleets.p4,
    "P5": fleets.p5,
    "P6": fleets.p6,
    "P7": parts.p7,
    "P9": parts.p9,
    "P12": parts.p12,
    "P14": parts.p14,
    "P16": parts.p16,
    "KILL": fleets.kill,
}
LONG = ("P2",)
"""Run only when named."""


def main() -> int:
    """Exit status 0 if everything could be measured, whether or not the goals are met."""
    about = "  ".join(f"{name}: {(run.__doc__ or '').splitlines()[0]}\n" for name, run in METRICS.items())
    parser = argparse.ArgumentParser(
        prog="ops/bench",
        description="Measures speed and cost, each beside its floor: the least program that does the same visible work.",
        epilog=f"metrics:\n  {about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("metrics", nargs="*", help=f"such as p1 p6 [all but {', '.join(LONG)}]")
    parser.add_argument("--quick", action="store_true", help="a tenth of every size: shows that it works, not how fast it is")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    given = parser.parse_args()
    wanted = [name.upper() for name in given.metrics] or [name for name in METRICS if name not in LONG]
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        parser.error(f"there is no metric {', '.join(unknown)}; there are {', '.join(METRICS)}")
    set_up_logs()
    logging.getLogger().setLevel(logging.ERROR)  # P14 runs a controller in this process
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    results = []
    try:
        for name in wanted:
            began = time.monotonic()
            result = asyncio.run(METRICS[name](Plan(folder, given.quick)))
            results.append(result)
            if given.output == "table":
                _print(result, time.monotonic() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if given.output == "json":
        machine = {"cpus": os.cpu_count(), "load": os.getloadavg(), "python": sys.version.split()[0], "quick": given.quick}
        told = {"machine": machine, "results": [result.as_json() for result in results]}
        sys.stdout.buffer.write(orjson.dumps(told, option=orjson.OPT_INDENT_2) + b"\n")
    return 0


def _print(result: Result, seconds: float) -> None:
    print(f"\n{result.metric}  {result.what}  ({seconds:.0f} s, load {os.getloadavg()[0]:.1f})")
    for name, value in result.figures.items():
        print(f"    {name:32} {value:>12,.5g}")
    for check in result.checks:
        print(f"    {'met   ' if check.met else 'MISSED'} {check}")
    for note in result.notes:
        print(f"    note: {note}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
