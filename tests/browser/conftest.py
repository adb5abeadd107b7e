"""One Chromium for all browser tests; each test gets contexts of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from playwright.async_api import Browser, async_playwright, expect

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Chromium with a user folder of its own, which Playwright makes and removes."""
    expect.set_options(timeout=30_000)  # how long a busy machine may take; a page that is right at once is not waited for
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path="/usr/bin/chromium", headless=True, args=list(FLAGS))
        yield chromium
        await chromium.close()
