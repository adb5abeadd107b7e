"""Many environments and hosts: the table, the grid, the keys; and that the cost is bounded by what is seen and what changed."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, expect

from specs.wire import Resource
from tests.browser.rig import NARROW, NOW, ScriptedController, creating, env, host, opened, shows, vm

pytestmark = pytest.mark.asyncio(loop_scope="session")

FULL = Resource(cpu_total=10, cpu_used=4, mem_total=1000, mem_used=950, disk_total=100, disk_used=10)


def rows(page: Page) -> Locator:
    """The rows of the table that are in the document."""
    return page.locator(".rows [role=row]")


async def names(page: Page, count: int) -> list[str]:
    """The names in the first rows."""
    return (await rows(page).locator("a").all_inner_texts())[:count]


def large(envs: int, each: int) -> ScriptedController:
    """So many environments of so many machines, all as desired, on one host."""
    machines = [vm(f"vm-{e}-{n}", env_id=f"env-{e}", name=f"m-{n}") for e in range(envs) for n in range(each)]
    return ScriptedController(host(), *(env(f"env-{n}", owner="ann" if n % 2 else "bob") for n in range(envs)), *machines)


async def test_a_table_of_thousands_has_the_rows_that_are_seen_and_tells_how_many_there_are(browser: Browser) -> None:
    async with large(2000, 1).serving() as told:
        for options in ({}, {"viewport": NARROW}):
            async with opened(browser, told.url, "#/envs", **options) as page:
                table = page.get_by_role("table", name="Environments")
                await expect(table).to_have_attribute("aria-rowcount", "2001")
                await expect(rows(page).first).to_have_attribute("aria-rowindex", "2")
                assert await rows(page).count() < 60
                await page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
                await expect(rows(page).last).to_have_attribute("aria-rowindex", "2001")
                await expect(rows(page).last).to_contain_text("env-1999")
                await expect(rows(page).last).to_be_in_viewport()
                assert await rows(page).count() < 60
                assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_search_filter_and_order_are_in_the_address_and_come_back_with_it(browser: Browser) -> None:
    async with large(40, 2).serving() as told:
        told.say(env("env-7", owner="ann", generation=4, observed_generation=3, phase="progressing", expires_at=NOW + 90_000))
        told.say(creating("vm-7-1", env_id="env-7", name="m-1"))
        async with opened(browser, told.url) as page:  # the first page too has the table when there are many
            await page.get_by_label("Filter").fill("ANN rack")
            await expect(page.get_by_role("status").filter(has_text="40 machines in 20 environments")).to_be_visible()
            await page.get_by_role("button", name="1 in progress").click()
            await expect(rows(page)).to_have_count(1)
            await expect(page).to_have_url(re.compile(r"#/\?q=ANN\+rack&only=busy$"))
            row = rows(page).first
            await expect(row.get_by_role("cell").nth(5)).to_have_text("3 → 4Deploying")
            await expect(row.get_by_role("cell").nth(4)).to_contain_text(re.compile(r"1 d|24 h|25 h"))
            await expect(row.get_by_role("img")).to_have_attribute("aria-label", "1 as desired, 1 in progress")
            await expect(row.locator("g title")).to_have_text(
                ["m-0: running → running (as desired)", "m-1: running → creating (in progress)"]
            )
            await row.get_by_role("link").click()
            await shows(page, "m-1")
            await page.go_back()
            await expect(rows(page)).to_have_count(1)
            await expect(page.get_by_label("Filter")).to_have_value("ANN rack")
        async with opened(browser, told.url, "#/envs?sort=machines&q=env-") as page:
            await expect(rows(page).first).to_contain_text("env-7")
            await expect(page.locator("[aria-sort=ascending]")).to_have_text(re.compile("Machines"))
            await page.get_by_role("button", name="Environment").click()
            await expect(rows(page).first).to_contain_text("env-0")
            await page.get_by_role("button", name="Environment").click()
            await expect(rows(page).first).to_contain_text("env-39")
            await expect(page).to_have_url(re.compile("sort=-name"))
            told.say(env("env-40"))
            await expect(rows(page).first).to_contain_text("env-40")
            assert await names(page, 3) == ["env-40", "env-39", "env-38"]


async def test_one_change_redraws_one_row_and_costs_no_walk_through_the_fleet(browser: Browser) -> None:
    async with large(100, 20).serving() as told, opened(browser, told.url, "#/envs") as page:
        await expect(rows(page).first).to_contain_text("20/20")
        await page.evaluate(
            """async () => {
                const { work } = await import("/static/store.mjs");
                Object.assign(work, { counted: 0, sorted: 0 });
                window.work = work;
                window.redrawn = new Set();
                const rowOf = (node) => (node.closest ? node : node.parentElement).closest(".rows [role=row]");
                const seen = (all) => all.forEach(({ target }) => redrawn.add(rowOf(target)?.querySelector("a").textContent));
                const what = { subtree: true, childList: true, characterData: true, attributes: true };
                new MutationObserver(seen).observe(document.querySelector("main"), what);
            }"""
        )
        told.say(creating("vm-3-5", env_id="env-3", name="m-5"))
        await expect(rows(page).nth(3)).to_contain_text("19/20")
        assert await page.evaluate("[[...redrawn], work]") == [
            ["env-3"],
            {"counted": 6, "sorted": 0},
        ]  # out and in, of three indices
        told.say(vm("vm-new", env_id="env-3", name="m-new"))
        await expect(rows(page).nth(3)).to_contain_text("20/21")
        assert await page.evaluate("work.sorted") == 21
        told.forget("vm", "vm-new")
        told.forget("vm", "vm-3-5")
        await expect(rows(page).nth(3)).to_contain_text("19/19")
        await expect(page).to_have_title(re.compile("^Environments · 1999/1999 as desired"))


async def test_changes_that_come_together_are_shown_together(browser: Browser) -> None:
    async with large(20, 1).serving() as told, opened(browser, told.url) as page:
        await shows(page, "env-19")
        await page.evaluate(
            """async () => {
                const { tally } = await import("/static/store.mjs");
                const { effect } = await import("/static/vendor/signals.mjs");
                window.drawn = 0;
                effect(() => { tally.value; drawn += 1; });
            }"""
        )
        for number in range(400):
            told.say((creating if number % 2 else vm)("vm-0-0", env_id="env-0", name="m-0", message=str(number)))
        told.say(vm("vm-last", env_id="env-0", name="last"))
        await expect(rows(page).first).to_contain_text("1/2")
        assert await page.evaluate("drawn") < 40


async def test_more_than_thirty_hosts_are_a_grid_in_which_each_says_its_state_in_words(browser: Browser) -> None:
    fleet = [host(f"rack-{n}") for n in range(40)]
    fleet += [host("away", state="offline"), host("shut", cordoned=True, resource=FULL)]
    for scheme in ("light", "dark"):
        async with (
            ScriptedController(*fleet, env(), vm()).serving() as told,
            opened(browser, told.url, color_scheme=scheme) as page,
        ):
            cells = page.get_by_role("list", name="Hosts").get_by_role("listitem")
            await expect(cells).to_have_count(42)
            await expect(page.locator("li.host")).to_have_count(0)
            await expect(cells.first).to_contain_text("away")
            await expect(cells.first).to_contain_text("offline, 31 % of vCPU, 3 machines")
            shut = cells.filter(has_text="shut")
            await expect(shut).to_contain_text("cordoned, 95 % of memory, 0 machines")
            await expect(page.locator(".heat-legend")).to_contain_text("90 % and more")
            found = await Axe().run(page)
            assert found.response["violations"] == [], found.generate_report()
            await shut.get_by_role("link").click()
            await expect(page).to_have_url(told.url + "#/host/shut")


async def test_the_keys_search_move_open_and_explain_themselves_but_not_while_typing(browser: Browser) -> None:
    async with large(30, 1).serving() as told, opened(browser, told.url, "#/envs") as page:
        await expect(rows(page).first).to_contain_text("env-0")
        focused = page.locator("*:focus")
        for key, name in (("j", "env-0"), ("j", "env-1"), ("j", "env-2"), ("k", "env-1")):
            await page.keyboard.press(key)
            await expect(focused).to_have_text(name)
        assert await focused.evaluate("(at) => parseFloat(getComputedStyle(at).outlineWidth)") >= 2
        await page.keyboard.press("/")
        await expect(page.get_by_label("Filter")).to_be_focused()
        await page.keyboard.type("j?/k")
        await expect(page.get_by_label("Filter")).to_have_value("j?/k")
        await page.get_by_label("Filter").fill("env-2")
        await page.keyboard.press("Escape")
        await expect(page.get_by_label("Filter")).not_to_be_focused()
        await page.keyboard.press("?")
        dialog = page.get_by_role("dialog", name="Keyboard")
        await expect(dialog).to_be_visible()
        await page.keyboard.press("j")
        await page.keyboard.press("Escape")
        await expect(dialog).not_to_be_visible()
        await page.get_by_role("button", name="Keyboard shortcuts").click()
        await dialog.get_by_role("button", name="Close").click()
        await expect(dialog).not_to_be_visible()
        await page.keyboard.press("j")
        await expect(focused).to_have_text(re.compile("env-"))
        await page.keyboard.press("Enter")
        # The address changes before the view does: what is pressed until then still means the old view.
        await expect(page.get_by_role("heading", name=re.compile("^Environment env-"))).to_be_focused()
        await page.keyboard.press("/")
        await expect(page.get_by_label("Filter")).to_be_focused()
        await expect(page).to_have_url(re.compile("#/envs$"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_table_the_help_the_key_page_and_the_stale_page_break_no_rule_of_axe(browser: Browser, scheme: str) -> None:
    async def clean(page: Page) -> None:
        found = await Axe().run(page)
        assert found.response["violations"] == [], found.generate_report()

    async with large(20, 2).serving() as told, opened(browser, told.url, "#/envs?sort=-name", color_scheme=scheme) as page:
        told.say(vm("vm-19-1", env_id="env-19", name="m-1", phase="degraded", state="failed"))
        await expect(rows(page).first).to_contain_text("1/2")
        await clean(page)
        await page.keyboard.press("?")
        await expect(page.get_by_role("dialog")).to_be_visible()
        await clean(page)
        await page.keyboard.press("Escape")
        await told.stop()
        await expect(page.locator(".banner")).to_be_visible()
        await clean(page)
    async with ScriptedController(key="k").serving() as told, opened(browser, told.url, color_scheme=scheme) as page:
        await page.get_by_label("API key").fill("wrong")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_contain_text("refused")
        await clean(page)
