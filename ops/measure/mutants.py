"""How many faults put into the core its tests notice: runs mutmut and sums up by module. Run by `ops/mutate`."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

GOAL = 0.9  # of all faults
NOTICED = ("killed", "timeout")
_LINE = re.compile(r"\s*(?P<name>(?P<module>[\w.]+)\.x\S+): (?P<verdict>[\w ]+)")


def verdicts(text: str) -> dict[str, tuple[str, str]]:
    """Module and verdict of every fault by its name, from what `mutmut results --all true` prints."""
    found = (match for line in text.splitlines() if (match := _LINE.fullmatch(line)))
    return {match["name"]: (match["module"], match["verdict"]) for match in found}


def summary(found: dict[str, tuple[str, str]]) -> tuple[list[str], float]:
    """A line for each module and one for all of them, and the share of faults that were noticed."""
    every: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    for module, verdict in found.values():
        for name in (module, "all of it"):
            every[name] += 1
            noticed[name] += verdict in NOTICED
    modules = sorted(every.keys() - {"all of it"})
    lines = [f"{name:28} {noticed[name]:5} of {every[name]:5}  {noticed[name] / every[name]:6.1%}" for name in modules]
    share = noticed["all of it"] / max(every["all of it"], 1)
    return [*lines, f"{'all of it':28} {noticed['all of it']:5} of {every['all of it']:5}  {share:6.1%}"], share


def main() -> None:
    """Exits with 0 if the goal is reached."""
    parser = argparse.ArgumentParser(prog="ops/mutate")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    tool = str(Path(sys.executable).with_name("mutmut"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([tool, "run", "--max-children", str(options.jobs)], check=True, env=environment)
    told = subprocess.run([tool, "results", "--all", "true"], check=True, capture_output=True, text=True, env=environment)
    found = verdicts(told.stdout)
    missed = sorted(name for name, (_, verdict) in found.items() if verdict not in NOTICED)
    if options.show:
        for name in missed:
            subprocess.run([tool, "show", name], check=True, env=environment)
    lines, share = summary(found)
    print("\n".join(lines))
    print(f"{'reached' if share >= GOAL else 'missed'}: the goal is {GOAL:.0%}")
    sys.exit(0 if share >= GOAL else 1)


if __name__ == "__main__":
    main()
