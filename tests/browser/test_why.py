"""From `/`, somebody new finds within three clicks why a machine is not running, with the production controller and agents."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, expect

from tests.browser.rig import opened
from tests.fleet_rig import FleetRig, env, vm

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def why(page: Page, url: str, name: str, *reasons: str) -> None:
    """One click, on the environment's name: its page says each of the reasons."""
    await page.goto(url)
    await page.locator("main").get_by_role("link", name=name, exact=True).first.click()
    await expect(page.locator("main h1 bdi")).to_have_text(name)
    for reason in reasons:
        await expect(page.locator("li.machine")).to_contain_text(re.compile(reason))


async def test_an_unplaceable_machine_and_a_missing_image_show_every_hosts_reason(browser: Browser, tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2) as rig, opened(browser, str(rig.http.base_url.join("/"))) as page:
        url = str(rig.http.base_url.join("/"))
        await rig.call("POST", "/api/envs", env("huge", vm(name="a", cpu=4096)))
        await rig.call("POST", "/api/envs", env("ghost", vm(name="b", image="nowhere")))
        await why(page, url, "huge", "host-0.*cpu", "host-1.*cpu")
        await why(page, url, "ghost", "host-0.*image", "host-1.*image")


async def test_a_host_that_is_away_and_a_machine_that_crashes_on_and_on_are_told(browser: Browser, tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig, opened(browser, str(rig.http.base_url.join("/"))) as page:
        url = str(rig.http.base_url.join("/"))
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))
        (machine,) = rig.hosts[0].running()
        done = asyncio.Event()

        async def crashing() -> None:
            while not done.is_set():
                rig.hosts[0].machines.crash(machine, "the kernel had enough")
                await asyncio.sleep(0.02)

        crashes = asyncio.create_task(crashing())
        await why(page, url, "web", "the kernel had enough", "attempts? so far")
        done.set()
        await crashes
        await expect(page.locator("li.machine .title-line .sign")).to_have_text("As desired")

        await rig.hosts[0].halt()
        await why(page, url, "web", "last known")
        await expect(page.locator("li.machine .message")).to_contain_text("host-0")
        await rig.hosts[0].boot()
        await expect(page.locator("li.machine .title-line .sign")).to_have_text("As desired")
        await expect(page.locator("li.machine")).not_to_contain_text("last known")
