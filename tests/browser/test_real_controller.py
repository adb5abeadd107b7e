"""The dashboard against the production controller and agents (their drivers in memory)."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from tests.browser.rig import opened, shows
from tests.fleet_rig import FleetRig, env, vm

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_an_environments_whole_life_is_followed_without_a_reload(browser: Browser, tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2, key="s3cret-long-enough") as rig:
        url = str(rig.http.base_url.join("/"))
        async with opened(browser, url) as page:
            await page.get_by_label("API key").fill("s3cret-long-enough")
            await page.keyboard.press("Enter")
            await expect(page.locator("li.host h3")).to_have_text(["host-0", "host-1"])
            await shows(page, "No environment yet")

            made = await rig.call("POST", "/api/envs", env("web", vm(name="a", ports=[80]), vm(name="b")))
            assert made.status_code == 201
            await expect(page.locator("li.machine .title-line .sign")).to_have_text(["As desired", "As desired"])
            first = (await rig.data("/api/envs/web"))["vms"][0]
            ssh = f"ssh -p {first['port_map']['22']} root@127.0.0.1"
            await expect(page.locator("li.machine").first.locator("code").first).to_have_text(ssh)

            await rig.call("POST", "/api/envs/web/stop")
            await expect(page.locator("li.machine .pair")).to_have_text(["DesiredStopped", "ActualStopped"] * 2)
            await expect(page.locator(".env-facts")).to_contain_text("2 of 2 as desired")

            impossible = await rig.call("POST", "/api/envs", env("big", vm(name="huge", cpu=4096)))
            assert impossible.status_code == 201
            await expect(page.locator("article.env", has_text="huge").locator(".message")).to_contain_text("waiting for a host")
            await expect(page.get_by_role("button", name="1 waiting")).to_be_visible()

            for name in ("big", "web"):
                await rig.call("DELETE", f"/api/envs/{name}")
            await shows(page, "No environment yet")
            await expect(page.locator("li.machine")).to_have_count(0)


async def test_a_restarted_controller_is_followed_again(browser: Browser, tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2) as rig:
        url = str(rig.http.base_url.join("/"))
        async with opened(browser, url) as page:
            await rig.call("POST", "/api/envs", env("web", vm(name="a")))
            await expect(page.locator("li.machine .title-line .sign")).to_have_text(["As desired"])
            placed = (await rig.data("/api/envs/web"))["vms"][0]["host_id"]
            idle = next(host for host in rig.hosts if host.name != placed)
            await idle.halt()
            await rig.stop_controller()
            await expect(page.locator(".banner")).to_be_visible()
            await rig.start_controller()
            await expect(page.locator(".banner")).to_have_count(0, timeout=30_000)
            await expect(page.locator("li.machine .title-line .sign")).to_have_text(["As desired"])
            await expect(page.locator("li.host.state-offline")).to_contain_text(idle.addr)

            # It was never online under this controller, so nothing was ever said of it but the snapshot.
            gone = await rig.call("DELETE", f"/api/hosts/{idle.addr}")
            assert gone.status_code == 200, gone.text
            await expect(page.locator("li.host h3")).to_have_text([placed])
