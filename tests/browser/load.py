"""What a large fleet that changes all the time costs a browser. Called by `ops/bench dashboard`; never part of the tests.

The controller is scripted (50 hosts, 5,000 VMs, 200 changes a second), the page, its stream and the browser are real.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

from tests.browser.conftest import FLAGS
from tests.browser.rig import WIDE, ScriptedController, creating, env, host, vm

EACH = 20  # VMs an environment
SECONDS = 10.0  # of each measurement
GOALS = {"longest_task_ms": 100.0, "frame_p95_ms": 33.0, "heap_mb": 300.0, "first_paint_ms": 1500.0, "fleet_shown_ms": 1500.0}

_LISTEN = """window.tasks = [];
new PerformanceObserver((all) => all.getEntries().forEach((one) => tasks.push([one.startTime, one.duration])))
    .observe({ type: "longtask", buffered: true });
new MutationObserver((_, self) => {
    if (document.querySelector("main .count")) {
        self.disconnect();
        requestAnimationFrame(() => { window.shownAt = performance.now(); });
    }
}).observe(document, { childList: true, subtree: true });"""
_SCROLL = """(ms) => new Promise((done) => {
    const deltas = [], end = performance.now() + ms;
    let last = 0, by = 30;
    const frame = (at) => {
        if (last) deltas.push(at - last);
        last = at;
        scrollBy(0, by);
        if (scrollY + innerHeight >= document.documentElement.scrollHeight - 2) by = -30;
        if (scrollY <= 0) by = 30;
        if (at < end) requestAnimationFrame(frame);
        else done(deltas);
    };
    requestAnimationFrame(frame);
})"""


async def _change(told: ScriptedController, vms: int, rate: float) -> None:
    """VMs leave their desired state and come back, evenly over the fleet."""
    began, said = time.monotonic(), 0
    while True:
        due = int((time.monotonic() - began) * rate)
        for number in range(said, due):
            at = number * 7919 % vms
            make = creating if number // vms % 2 == 0 else vm
            told.say(make(f"vm-{at}", **_place(at)))
        said = max(said, due)
        await asyncio.sleep(0.02)


def _place(at: int) -> dict[str, Any]:
    return {"env_id": f"env-{at // EACH}", "name": f"m-{at % EACH}", "host_id": f"host-{at % 50}"}


async def _measure(browser: Browser, url: str, path: str) -> dict[str, float]:
    context = await browser.new_context(viewport=WIDE)  # type: ignore[arg-type]
    page: Page = await context.new_page()
    await page.add_init_script(_LISTEN)
    await page.goto(url + path)
    await page.locator("main .count").first.wait_for()
    deltas = sorted(await page.evaluate(_SCROLL, SECONDS * 1000))
    devtools = await context.new_cdp_session(page)
    await devtools.send("Performance.enable")
    metrics = {one["name"]: one["value"] for one in (await devtools.send("Performance.getMetrics"))["metrics"]}
    tasks = await page.evaluate("window.tasks")
    paint = await page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    figures = {
        "longest_task_ms": max((task[1] for task in tasks), default=0.0),
        "tasks_over_100_ms": float(sum(task[1] > 100 for task in tasks)),
        "frame_p95_ms": deltas[int(len(deltas) * 0.95)],
        "frames": float(len(deltas)),
        "heap_mb": metrics["JSHeapUsedSize"] / 1e6,
        "elements": metrics["Nodes"],
        "first_paint_ms": paint,
        "fleet_shown_ms": await page.evaluate("window.shownAt"),
    }
    await context.close()
    return figures


async def main() -> int:
    """Prints the figures of each view; exit status 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="ops/bench dashboard", description=__doc__)
    parser.add_argument("--vms", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=200.0, help="changes a second")
    given = parser.parse_args()
    machines = [vm(f"vm-{at}", **_place(at)) for at in range(given.vms)]
    envs = [env(f"env-{at}") for at in range(-(-given.vms // EACH))]
    missed = False
    async with (
        ScriptedController(*(host(f"host-{at}") for at in range(50)), *envs, *machines).serving() as told,
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))
        changing = asyncio.create_task(_change(told, given.vms, given.rate))
        for path in ("#/", "#/envs", "#/envs?q=m-1&sort=machines"):
            figures = await _measure(browser, told.url, path)
            over = [name for name, goal in GOALS.items() if figures[name] > goal]
            missed = missed or bool(over)
            sys.stdout.write(
                f"{path}  {json.dumps({name: round(value, 1) for name, value in figures.items()})}  missed: {over}\n"
            )
        changing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await changing
        await browser.close()
    return int(missed)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
