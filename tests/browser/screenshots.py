"""Pictures of each view of the dashboard, wide and narrow, light and dark. Called by ops/screenshots/take with a folder.

The controller and the agents are the production's; the agents' machines are in memory.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from playwright.async_api import Browser, async_playwright

from tests.browser.conftest import FLAGS
from tests.browser.rig import NARROW, WIDE
from tests.fleet_rig import FleetRig, env, vm

VIEWS = {
    "fleet": "",
    "environment": "#/env/shop",
    "host": "#/host/host-0",
    "edit": "#/edit/shop",
    "waiting": "#/env/render-farm",
}
MOST_BYTES = 150_000
_QUALITY = (80, 60, 40, 20)


async def _fill(rig: FleetRig) -> None:
    """Environments that are as desired, stopped and waiting; counts are taken all along."""
    steps = [
        ("POST", "/api/envs?wait=30", env("shop", vm(name="web", count=3, ports=[80]), vm(name="db"), owner="alice")),
        ("POST", "/api/envs?wait=30", env("ci", vm(name="runner", count=4), owner="bob")),
        ("POST", "/api/envs?wait=30", env("staging", vm(name="app"), owner="alice")),
        ("POST", "/api/envs/staging/stop?wait=30", None),
        ("POST", "/api/envs", env("render-farm", vm(name="gpu", cpu=512), owner="carol")),
    ]
    for method, path, body in steps:
        (await rig.call(method, path, body)).raise_for_status()
        for _ in range(3):
            rig.app.history.sample()
            await asyncio.sleep(1)
    await rig.hosts[-1].halt()
    await rig.until(lambda: not all(host.online for host in rig.app.controller.fleet.hosts.values()))


async def _shoot(browser: Browser, url: str, folder: Path) -> None:
    for width, viewport in (("1440", WIDE), ("375", NARROW)):
        for scheme in ("light", "dark"):
            context = await browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
            for name, path in VIEWS.items():
                page = await context.new_page()
                await page.goto(url + path)
                await page.locator("main h1").wait_for()
                wanted = {"fleet": ".plot canvas", "edit": ".plan li", "host": ".events"}.get(name, ".beside")
                await page.locator(wanted).first.wait_for()
                for quality in _QUALITY:
                    picture = await page.screenshot(type="jpeg", quality=quality, full_page=True)
                    if len(picture) <= MOST_BYTES:
                        break
                (folder / f"{name}-{width}-{scheme}.jpg").write_bytes(picture)
                await page.close()
            await context.close()


async def main(folder: Path) -> None:
    """Writes every picture into a folder that is there."""
    with tempfile.TemporaryDirectory() as data:
        async with FleetRig(Path(data), hosts=4) as rig, async_playwright() as playwright:
            await _fill(rig)
            browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))
            await _shoot(browser, str(rig.http.base_url.join("/")), folder)
            await browser.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
