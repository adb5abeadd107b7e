"""The dashboard keeps following the controller: keys, lost connections, gaps. In a real browser."""

from __future__ import annotations

import pytest
from playwright.async_api import Browser, expect

from tests.browser.rig import ScriptedController, creating, env, host, opened, shows, vm

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_lost_controller_is_said_and_followed_again_from_where_it_was_lost(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm(), creating()).serving() as told, opened(browser, told.url) as page:
        await shows(page, "web-2")
        await expect(page.locator(".top .link")).to_have_text("Live")
        await told.stop()
        await expect(page.locator(".banner")).to_contain_text("What you see may have changed")
        await expect(page.locator(".top .link")).to_have_text("Not live")
        await expect(page.locator("li.machine")).to_have_count(2)  # the old picture stays, and is called old
        assert (await page.title()).startswith("⚠ ")
        told.say(vm("vm-2", name="web-2", port_map={"22": 20200}))
        await told.start()
        await page.get_by_role("button", name="Try now").click()
        await shows(page, "ssh -p 20200 root@10.20.0.11")
        await expect(page.locator(".banner")).to_have_count(0)
        await expect(page.locator(".top .link")).to_have_text("Live")
        assert told.asked == [(None, None), (100, None)]


async def test_it_reconnects_by_itself(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm()).serving() as told, opened(browser, told.url) as page:
        await shows(page, "web-1")
        await told.stop()
        await expect(page.locator(".banner")).to_be_visible()
        await told.start()
        await expect(page.locator(".banner")).to_have_count(0, timeout=30_000)
        told.say(creating())
        await shows(page, "web-2")


async def test_a_revision_that_is_no_longer_kept_leads_to_a_new_snapshot(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm(), creating()).serving() as told, opened(browser, told.url) as page:
        await shows(page, "web-2")
        told.objects.pop(("vm", "vm-2"))
        told.revision = told.oldest = 5000
        told.shout(None)
        await expect(page.locator("li.machine h3")).to_have_text(["web-1"])
        await expect(page.locator(".top .link")).to_have_text("Live")
        assert told.asked == [(None, None), (100, None), (None, None)]


@pytest.mark.parametrize(
    "nonsense",
    [
        'event: change\ndata: {"revision": 7, "kind": "vm", "id": "vm-1", "object": null}\n\n',
        "event: change\ndata: {not json\n\n",
        'event: snapshot\ndata: {"revision": 101}\n\n',
    ],
    ids=["back in time", "not JSON", "not a snapshot"],
)
async def test_nonsense_in_the_stream_leads_to_a_new_snapshot(browser: Browser, nonsense: str) -> None:
    async with ScriptedController(host(), env(), vm()).serving() as told, opened(browser, told.url) as page:
        await shows(page, "web-1")
        told.shout(nonsense)
        await expect(page.locator(".banner")).to_be_visible()
        told.objects["vm", "vm-2"] = creating()
        await shows(page, "web-2")
        await expect(page.locator(".banner")).to_have_count(0)
        await expect(page.locator("li.machine h3")).to_have_text(["web-1", "web-2"])
        assert told.asked == [(None, None), (None, None)]


async def test_a_controller_that_falls_silent_is_noticed(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm()).serving() as told, opened(browser, told.url, None) as page:
        await page.clock.install()
        await page.goto(told.url)
        await shows(page, "web-1")
        await page.clock.run_for(20_000)
        await expect(page.locator(".banner")).to_have_count(0)
        await page.clock.run_for(5_100)
        await expect(page.locator(".banner")).to_contain_text("the controller fell silent")
        await page.clock.run_for(1_000)
        await expect(page.locator(".banner")).to_have_count(0)
        assert told.asked == [(None, None), (100, None)]


async def test_a_wrong_key_is_refused_in_words_and_the_right_one_opens(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm(), key="s3cret").serving() as told, opened(browser, told.url) as page:
        field = page.get_by_label("API key")
        await expect(field).to_be_focused()
        await field.fill("två ord")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("A key has no spaces and no letters beyond ASCII.")
        await field.fill("guess")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("The controller refused this key.")
        assert "web" not in await page.locator("main").inner_text()
        await field.fill("s3cret")
        await page.get_by_role("button", name="Show the fleet").click()
        await shows(page, "web-1")
        assert told.asked == [(None, None), (None, "Bearer guess"), (None, "Bearer s3cret")]
        assert await page.evaluate("[localStorage.length, document.cookie, location.search]") == [0, "", ""]
        await page.reload()
        await shows(page, "web-1")  # kept for this tab
        await page.get_by_role("button", name="Forget the key").click()
        await expect(field).to_be_visible()
        assert "web-1" not in await page.locator("body").inner_text()
        assert await page.evaluate("sessionStorage.length") == 0


async def test_a_key_that_is_changed_meanwhile_hides_the_fleet(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm(), key="old").serving() as told, opened(browser, told.url) as page:
        await page.get_by_label("API key").fill("old")
        await page.keyboard.press("Enter")
        await shows(page, "web-1")
        told.key = "new"
        told.shout(None)
        await expect(page.get_by_role("alert")).to_have_text("The controller refused this key.")
        assert "web-1" not in await page.locator("body").inner_text()
        await page.get_by_label("API key").fill("new")
        await page.keyboard.press("Enter")
        await shows(page, "web-1")


async def test_a_controller_that_is_not_there_at_first_is_waited_for(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm()).serving() as told, opened(browser, told.url, None) as page:
        await page.route("**/api/watch*", lambda route: route.fulfill(status=503, body="{}"))
        await page.goto(told.url)
        await expect(page.locator(".banner")).to_contain_text("No word from the controller — the controller answered 503")
        await page.unroute("**/api/watch*")
        await shows(page, "web-1")
        await expect(page.locator(".banner")).to_have_count(0)
