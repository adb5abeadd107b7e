"""The controller's route table: every path it serves. Feeds the server and the OpenAPI document."""

from __future__ import annotations

from typing import Any

from api import env_handlers, fleet_handlers, handlers, page_handlers, site
from specs.openapi import with_document

ROUTES: list[Any] = with_document(
    "muster controller", [*handlers.ROUTES, *env_handlers.ROUTES, *fleet_handlers.ROUTES, *page_handlers.ROUTES, *site.ROUTES]
)
