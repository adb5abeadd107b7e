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


async def test_a_console_is_followed_while_it_is_open_and_never_obeyed(browser: Browser, tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))
        (machine,) = rig.hosts[0].machines.machines.values()
        async with opened(browser, str(rig.http.base_url.join("/")), "#/env/web") as page:
            await page.locator("summary", has_text="Console").click()
            console = page.get_by_label("Console of a")
            await expect(console).to_have_text("boot 1")
            machine.console += "\x1b[2J\u202e<script>broken.push(1)</script>\n".encode()
            await expect(console).to_contain_text("\u241b[2J<202E><script>broken.push(1)</script>")
            await rig.hosts[0].halt()
            await expect(page.locator(".console .message")).to_contain_text("host-0")
            await rig.hosts[0].boot()
            await expect(page.locator(".console .message")).to_have_count(0)


async def test_events_missed_while_the_controller_was_away_are_shown_when_it_is_back(browser: Browser, tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))
        async with opened(browser, str(rig.http.base_url.join("/")), "#/env/web") as page:
            await expect(page.locator(".events li").first).to_be_visible()
            await page.route("**/api/watch*", lambda route: route.abort())
            await rig.stop_controller()
            await rig.start_controller()
            (vm_id,) = rig.hosts[0].running()
            rig.hosts[0].machines.crash(vm_id, "the kernel had enough of it")
            await rig.until(lambda: vm_id in rig.hosts[0].running())
            await expect(page.locator(".banner")).to_be_visible()
            await page.unroute("**/api/watch*")
            await expect(page.locator(".banner")).to_have_count(0)
            await expect(page.locator(".events")).to_contain_text("the kernel had enough of it")
