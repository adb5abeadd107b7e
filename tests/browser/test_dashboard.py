"""What the dashboard shows of what the controller says, in a real browser."""

from __future__ import annotations

import re
import time

import pytest
from playwright.async_api import Browser, Locator, Page, expect

from specs.wire import Env, Host, Resource, Vm
from tests.browser.rig import NARROW, WIDE, ScriptedController, creating, env, host, opened, shows, vm

pytestmark = pytest.mark.asyncio(loop_scope="session")


def machine(page: Page, name: str) -> Locator:
    """The row of a machine."""
    return page.locator("li.machine", has=page.get_by_role("heading", name=name, exact=True))


async def figure(page: Page, ok: int, total: int) -> None:
    """Waits until the big figure says so many of so many."""
    said = re.compile(rf"^\s*{ok}[\s/]*of[\s/]*{total}[\s/]*machines\s+as\s+desired\s*$")
    await expect(page.locator("main h1")).to_have_text(said, use_inner_text=True)


async def test_a_snapshot_shows_hosts_environments_and_machines_desired_against_actual(browser: Browser) -> None:
    late = creating(attempts=3, next_attempt_at=int(time.time()) + 250, phase="degraded", message="create failed: no room left")
    async with (
        ScriptedController(host(), env(expires_at=int(time.time()) + 7200), vm(), late).serving() as told,
        opened(browser, told.url) as page,
    ):
        await shows(page, "web-1")
        await figure(page, 1, 2)
        assert await page.locator("li.machine").all_inner_texts() != []
        row = machine(page, "web-1")
        await expect(row).to_contain_text("As desired")
        await expect(row.locator(".pair")).to_have_text(["DesiredRunning", "ActualRunning"])
        await expect(row.locator("code").first).to_have_text("ssh -p 20100 root@10.20.0.11")
        await expect(row.get_by_role("link", name="10.20.0.11:20101")).to_have_attribute("href", "http://10.20.0.11:20101/")
        row = machine(page, "web-2")
        await expect(row.locator(".pair")).to_have_text(["DesiredRunning", "ActualCreating"])
        await expect(row.locator(".message")).to_have_text("create failed: no room left")
        await expect(row.locator(".attempts")).to_have_text(re.compile(r"3 attempts so far.*next try in [34] min \d+ s"))
        card = page.locator("li.host")
        await expect(card).to_contain_text("Online")
        await expect(card.locator("dd")).to_have_text(["5 of 16", "9.5 of 64 GiB", "200 of 900 GiB"])
        await expect(page.locator(".env-facts")).to_contain_text(
            re.compile(r"1 of 2 as desired.*owner alice.*expires in (1 h 59|2 h)")
        )
        await expect(page).to_have_title("1/2 as desired · muster")


async def test_every_change_shows_without_a_reload(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm(), creating()).serving() as told, opened(browser, told.url) as page:
        await shows(page, "web-2")
        told.say(vm("vm-2", name="web-2", port_map={"22": 20200}))
        await expect(machine(page, "web-2")).to_contain_text("ssh -p 20200 root@10.20.0.11")
        await figure(page, 2, 2)
        told.say(host("rack-2", addr="10.20.0.12:9100"), env("db"), vm("vm-3", env_id="db", name="postgres", host_id="rack-2"))
        await expect(machine(page, "postgres")).to_contain_text("root@10.20.0.12")
        told.say(host("rack-2", addr="10.20.0.12:9100", state="offline", message="no answer for 30 s"))
        await expect(machine(page, "postgres")).to_contain_text("last known")
        await expect(page.locator("li.host.state-offline")).to_contain_text("no answer for 30 s")
        told.say(vm("vm-3", env_id="db", name="postgres", host_id="rack-2", desired="absent", phase="terminating"))
        await expect(machine(page, "postgres").locator(".pair")).to_have_text(["DesiredGone", "ActualRunninglast known"])
        told.forget("vm", "vm-3")
        told.forget("env", "db")
        told.forget("host", "rack-2")
        await expect(page.locator("article.env h3 a")).to_have_text(["web"])
        await expect(page.locator("li.host")).to_have_count(1)
        await figure(page, 2, 2)
        assert told.asked == [(None, None)]


async def test_a_stream_cut_inside_a_character_and_keep_alives_lose_nothing(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm()).serving() as told, opened(browser, told.url) as page:
        await shows(page, "web-1")
        told.shout(": keep-alive\n\n")
        cut = f'{{"revision":101,"kind":"env","id":"web","object":{env(owner="Åse").model_dump_json()}}}'
        told.shout("event: change\r\ndata: " + cut[:40])
        told.shout(cut[40:] + "\r")
        told.shout("\n\r\n")
        await expect(page.locator(".env-facts")).to_contain_text("owner Åse")
        assert await page.evaluate(
            """async () => {
                const { eventParser } = await import("/static/sse.mjs");
                const push = eventParser();
                const pieces = [
                    "data:a\\n", "data: b\\n\\n", ":c\\nevent: x\\rdata: 1\\r", "\\r",
                    "\\nid: 4\\r\\n\\r\\n", "data: never ended\\n",
                ];
                return pieces.flatMap(push).map(({ event, data }) => `${event}=${data}`);
            }"""
        ) == ["message=a\nb", "x=1"]


async def test_hostile_names_are_text(browser: Browser) -> None:
    names = [
        "<script>window.broken.push('script')</script>",
        '"><img src=x onerror="window.broken.push(\'img\')">',
        "' onmouseover='broken.push(1)",
        "\u202egnp.exe \u05e9\u05dc\u05d5\u05dd",
        "__proto__",
        "${7*7}{{7*7}}",
        "x" * 10240,
    ]
    machines = [
        vm(f"vm-{n}", name=name, env_id=name, host_id=name, message=name, image=name, ip=name) for n, name in enumerate(names)
    ]
    rest = [thing for name in names for thing in (host(name, addr=name, message=name), env(name, owner=name))]
    for size in (WIDE, NARROW):
        async with ScriptedController(*rest, *machines).serving() as told, opened(browser, told.url, viewport=size) as page:
            await expect(page.locator("li.machine")).to_have_count(len(names))
            assert sorted(await page.locator("li.machine h3 bdi").all_text_contents()) == sorted(names)
            assert sorted(await page.locator("article.env > header h3").all_text_contents()) == sorted(names)
            assert sorted(await page.locator("li.host h3").all_text_contents()) == sorted(names)
            assert await page.locator("#app script, #app img").count() == 0
            assert await page.locator("code", has_text="ssh").count() == 0  # no host here has an address to paste safely
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            for name in names[:5]:
                await page.locator("article.env > header h3 a").filter(has_text=name).first.click()
                await expect(page.locator("main h1 bdi")).to_have_text(name)
                await expect(page.locator("li.machine")).to_have_count(1)
                await page.go_back()
                await expect(page.locator("li.machine")).to_have_count(len(names))


async def test_links_to_an_environment_and_a_host_open_them_and_say_when_they_are_gone(browser: Browser) -> None:
    machines = [vm(f"vm-{n}", name=f"web-{n}") for n in range(1, 10)]
    async with ScriptedController(host(), env(), *machines).serving() as told:
        async with opened(browser, told.url) as page:
            await expect(page.locator("li.machine")).to_have_count(6)
            await page.get_by_role("link", name="Show all 9 machines of this environment").click()
            await expect(page).to_have_url(told.url + "#/env/web")
            await expect(page.locator("li.machine")).to_have_count(9)
            await expect(page.locator("main h1")).to_be_focused()
            await page.locator("summary").first.click()
            await expect(page.locator("li.machine dl").first).to_contain_text("vm-1")
            await page.locator(".where a").first.click()
            await expect(page).to_have_url(told.url + "#/host/rack-1")
            await expect(page.locator("li.machine")).to_have_count(9)
        async with opened(browser, told.url, "#/env/web") as page:
            await expect(page.locator("li.machine")).to_have_count(9)
            for number in range(1, 10):
                told.forget("vm", f"vm-{number}")
            told.forget("env", "web")
            await shows(page, "There is no environment of this name")
        async with opened(browser, told.url, "#/host/%E0%A4%A") as page:
            await shows(page, "There is no host of this id")


async def test_the_filter_and_the_legend_narrow_the_list(browser: Browser) -> None:
    fine = [vm(f"vm-{n}", name=f"web-{n}") for n in range(1, 9)]
    async with (
        ScriptedController(
            host(), env(), env("db", owner="bob"), *fine, creating("vm-9", env_id="db", name="postgres")
        ).serving() as told,
        opened(browser, told.url) as page,
    ):
        await shows(page, "postgres")
        await page.get_by_role("button", name="1 in progress").click()
        await expect(page.locator("li.machine h3")).to_have_text(["postgres"])
        await expect(page.get_by_role("button", name="1 in progress")).to_have_attribute("aria-pressed", "true")
        await page.get_by_role("button", name="Show all").click()
        await page.get_by_label("Filter").fill("rack-1 WEB-7")
        await expect(page.locator("li.machine h3")).to_have_text(["web-7"])
        await page.get_by_label("Filter").fill("bob")
        await expect(page.locator("li.machine h3")).to_have_text(["postgres"])
        told.say(vm("vm-10", env_id="db", name="replica"))
        await expect(page.locator("li.machine h3")).to_have_text(["postgres", "replica"])


async def test_the_ssh_command_is_copied_also_where_the_clipboard_api_is_not(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm()).serving() as told:
        for permissions in (["clipboard-read", "clipboard-write"], []):
            async with opened(browser, told.url, permissions=permissions) as page:
                button = page.get_by_role("button", name="Copy the ssh command of web-1")
                if not permissions:
                    await page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
                await button.focus()
                await page.keyboard.press("Enter")
                await expect(button).to_have_text("Copied")
                await expect(page.locator("div.unseen[aria-live]")).to_have_text("Copied: the ssh command of web-1")
                await expect(button).to_be_focused()
                await page.get_by_label("Filter").focus()
                await page.keyboard.press("Control+v")
                await expect(page.get_by_label("Filter")).to_have_value("ssh -p 20100 root@10.20.0.11")


async def test_everything_can_be_reached_and_seen_with_the_keyboard(browser: Browser) -> None:
    async with ScriptedController(host(), env(), vm()).serving() as told, opened(browser, told.url) as page:
        await shows(page, "web-1")
        reached = []
        for _ in range(40):
            await page.keyboard.press("Tab")
            told_of = await page.evaluate(
                """() => {
                    const at = document.activeElement, style = getComputedStyle(at);
                    if (at === document.body) return null;
                    const name = at.getAttribute("aria-label") || at.labels?.[0]?.textContent || at.textContent.trim();
                    return { name, outlined: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 };
                }"""
            )
            if told_of is None:
                break
            reached.append(told_of)
        assert [stop["name"] for stop in reached if not stop["outlined"]] == []
        assert [stop["name"] for stop in reached] == [
            "Skip to the fleet",
            "muster",
            "Keyboard shortcuts",
            "1 as desired",
            "Hosts online",
            "Environments",
            "New environment",
            "Filter",
            "web",
            "rack-1",
            "Copy the ssh command of web-1",
            "10.20.0.11:20101 (opens a new tab)",
            "Copy the address of port 80 of web-1",
            "rack-1",
        ]


async def test_no_page_is_wider_than_a_phone_and_every_text_has_contrast_in_both_schemes(browser: Browser) -> None:
    busy = [vm(), creating(), creating("vm-3", name="web-3", phase="pending"), vm("vm-4", name="web-4", desired="absent")]
    bad = vm("vm-5", name="web-5", phase="degraded", state="failed", message="x" * 300, attempts=2)
    full = Resource(cpu_total=8, cpu_used=9, mem_total=1024, mem_used=1024)
    fleet: tuple[Host | Env | Vm, ...] = (
        host(),
        host("rack-2", state="offline", message="no answer", resource=full),
        env(phase="degraded"),
        *busy,
        bad,
    )
    for scheme in ("light", "dark"):
        async with ScriptedController(*fleet).serving() as told:
            for path in ("", "#/env/web", "#/host/rack-1"):
                async with opened(browser, told.url, path, viewport=NARROW, color_scheme=scheme) as page:
                    await shows(page, "web-1")
                    assert await page.evaluate("document.documentElement.scrollWidth") <= 375
                    assert await page.evaluate(_LOW_CONTRAST) == []


# WCAG 2.2, success criterion 1.4.3: 4.5 to 1 between a text and what is behind it.
_LOW_CONTRAST = """() => {
    const parse = (c) => c.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (at) => { for (; at; at = at.parentElement) { const c = parse(getComputedStyle(at).backgroundColor);
        if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
    const texts = document.createTreeWalker(document.getElementById("app"), NodeFilter.SHOW_TEXT), low = [];
    while (texts.nextNode()) {
        const text = texts.currentNode, at = text.parentElement;
        if (!text.textContent.trim() || !at.checkVisibility()) continue;
        const [a, b] = [light(parse(getComputedStyle(at).color)), light(behind(at))].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < 4.5) low.push(`${text.textContent.trim().slice(0, 40)}: ${contrast.toFixed(2)}`);
    }
    return low;
}"""


async def test_words_for_sizes_spans_and_addresses(browser: Browser) -> None:
    async with ScriptedController().serving() as told, opened(browser, told.url) as page:
        await shows(page, "No host yet", "No environment yet")
        assert await page.evaluate(
            """async () => {
                const { size, share, span, reachable, sshCommand, endpoints } = await import("/static/format.mjs");
                return [
                    [0, 512, 1536, 20480, 2097152].map(size),
                    [share(0, 0), share(512, 8192), share(300, 900)],
                    [-5, 0, 45, 200, 3600, 7500, 86400, 90000, 86460].map(span),
                    [
                        "10.0.0.2:9100", "[fd00::2]:9100", "node-a.lab:9100", "127.0.0.1:9100", "[::1]:9100",
                        "x", "-oProxyCommand=x:9100", "a;b:9100", "a b:1", "u@h:9100",
                    ].map((addr) => reachable(addr, "192.0.2.5")),
                    reachable("127.0.0.1:9100", "localhost"),
                    reachable("127.0.0.1:9100", "[fd00::9]"),
                    [["10.0.0.2", 20100], ["", 20100], ["10.0.0.2"], ["h", "1;reboot"]].map((at) => sshCommand(...at)),
                    endpoints("fd00::2", { "22": 1, "9000": 4, "80": 2, "443": 3 }).map((one) => Object.values(one).join(" ")),
                ];
            }"""
        ) == [
            ["0 MiB", "512 MiB", "1.5 GiB", "20 GiB", "2 TiB"],
            ["0 of 0 MiB", "0.5 of 8 GiB", "300 of 900 MiB"],
            ["0 s", "0 s", "45 s", "3 min 20 s", "1 h", "2 h 5 min", "1 d", "1 d 1 h", "1 d"],
            ["10.0.0.2", "fd00::2", "node-a.lab", "192.0.2.5", "192.0.2.5", "", "", "", "", ""],
            "127.0.0.1",
            "fd00::9",
            ["ssh -p 20100 root@10.0.0.2", "", "", ""],
            ["80 [fd00::2]:2 http://[fd00::2]:2/", "443 [fd00::2]:3 https://[fd00::2]:3/", "9000 [fd00::2]:4 "],
        ]


async def test_times_are_counted_on_the_controllers_clock(browser: Browser) -> None:
    ahead = 3 * 86400
    there = int(time.time()) + ahead  # not of the module's load: a whole suite may have run since
    async with (
        ScriptedController(
            host(), env(expires_at=there + 7000), env("db", expires_at=there - 60), clock_ahead=ahead
        ).serving() as told,
        opened(browser, told.url) as page,
    ):
        await expect(page.locator(".env-facts").nth(0)).to_contain_text("expiring now")
        await expect(page.locator(".env-facts").nth(1)).to_contain_text(re.compile(r"expires in 1 h (5[0-6]|4\d) min"))
