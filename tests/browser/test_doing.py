"""What people do in the dashboard against the production controller, and that everybody can use each view."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, expect

from tests.browser.rig import opened, shows
from tests.fleet_rig import KEY, FleetRig, env, vm

pytestmark = pytest.mark.asyncio(loop_scope="session")

YAML = f"""\
id: shop
ssh_keys: ["{KEY}"]
vms:
  - name: a
    image: tiny
    cpu: 1
    mem: 128
    disk: 256
"""


async def test_yaml_is_mended_applied_stopped_edited_and_deleted_in_the_page(browser: Browser, tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig, opened(browser, str(rig.http.base_url.join("/"))) as page:
        await page.get_by_role("link", name="New environment").click()
        field = page.get_by_label("The environment as YAML")
        await field.fill(YAML.replace("cpu: 1", "cpus: 1"))
        await expect(page.locator(".mistakes li")).to_contain_text("cpus")
        await expect(page.locator(".gutter .bad")).to_have_text("▸6")
        await expect(page.get_by_role("button", name="Apply")).to_be_disabled()
        await page.get_by_role("button", name="Line 6").click()
        await expect(field).to_be_focused()
        await field.fill(YAML)
        await expect(page.locator(".plan li")).to_contain_text("host-0")
        await page.get_by_role("button", name="Apply").click()
        await expect(page.locator("main h1 bdi")).to_have_text("shop")
        await expect(page.locator("li.machine .title-line .sign")).to_have_text(["As desired"])
        await expect(page.locator(".lane li").first).to_contain_text("accepted")
        await expect(page.locator(".yaml")).to_contain_text("id: shop")
        await expect(page.locator(".differs")).to_have_count(0)
        await expect(page.locator(".events li").first).to_be_visible()

        await page.get_by_role("button", name="Stop", exact=True).click()
        await expect(page.locator("li.machine .pair")).to_have_text(["DesiredStopped", "ActualStopped"])
        await page.get_by_role("button", name="Start", exact=True).click()
        await expect(page.locator("li.machine .pair")).to_have_text(["DesiredRunning", "ActualRunning"])
        await page.get_by_label("Lifetime from now").select_option("never")
        await page.get_by_role("button", name="Extend").click()
        await shows(page, "never expires")

        await page.get_by_role("link", name="Edit").click()
        await expect(field).to_have_value(re.compile("id: shop"))
        await field.fill((await field.input_value()).replace("mem: 128", "mem: 256"))
        await expect(page.locator(".plan li")).to_contain_text("differs in mem")
        await page.get_by_role("button", name="Apply").click()
        # First the old one is there alone, then for a moment both are, at last the new one alone.
        await expect(page.locator("li.machine")).to_have_text([re.compile("As desired.*256 MiB", re.DOTALL)])

        await page.get_by_role("button", name="Delete…").click()
        sure = page.get_by_role("button", name="Delete it")
        await page.get_by_label("Type the name of the environment").fill("shopp")
        await expect(sure).to_be_disabled()
        await page.get_by_label("Type the name of the environment").fill("shop")
        await sure.click()
        await shows(page, "There is no environment of this name")


async def test_a_host_is_cordoned_and_taken_back_in_the_page(browser: Browser, tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig, opened(browser, str(rig.http.base_url.join("/")), "#/host/host-0") as page:
        await page.get_by_role("button", name="Cordon", exact=True).click()
        await shows(page, "Cordoned")
        await page.get_by_role("button", name="Drain", exact=True).click()
        await shows(page, "Cordoned, drained: 0 of 0 left")
        await page.get_by_role("button", name="Uncordon, end the drain").click()
        await expect(page.get_by_role("button", name="Cordon", exact=True)).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_no_view_breaks_a_rule_of_axe_and_the_last_hour_is_drawn(browser: Browser, tmp_path: Path, scheme: str) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a", ports=[80])))
        await rig.call("POST", "/api/envs", env("big", vm(name="huge", cpu=4096)))
        for _ in range(3):
            rig.app.history.sample()
        async with opened(browser, str(rig.http.base_url.join("/")), color_scheme=scheme) as page:
            await shows(page, "huge")
            await expect(page.locator(".plot canvas")).to_be_visible(timeout=30_000)
            for path in ("", "#/env/web", "#/env/big", "#/host/host-0", "#/new", "#/edit/web"):
                await page.goto(str(rig.http.base_url.join("/")) + path)
                await expect(page.locator("main h1")).to_be_visible()
                found = await Axe().run(page)
                assert found.response["violations"] == [], (path, found.generate_report())
