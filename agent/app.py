"""The agent's route table. Called by main and by tests."""

from __future__ import annotations

from typing import Any

from tornado.web import Application

from agent import handlers
from agent.disk_handler import DiskHandler
from agent.handlers import Services, explain
from specs import http
from specs.openapi import with_document
from specs.serving import Access


def make_routes() -> list[Any]:
    """The agent's route table: every path it serves."""
    vm = r"/api/vms/(?P<vm_id>[^/]+)"
    routes: list[Any] = [
        (r"/api/info", handlers.InfoHandler),
        (r"/api/images", handlers.ImagesHandler),
        (r"/api/vms", handlers.VmsHandler),
        (vm, handlers.VmHandler),
        (rf"{vm}/spec", handlers.SpecHandler),
        (rf"{vm}/console", handlers.ConsoleHandler),
        (rf"{vm}/(?P<verb>stop|start)", handlers.PowerHandler),
        (rf"{vm}/disk", DiskHandler),
        (r"/healthz", handlers.HealthHandler),
        (r"/readyz", handlers.ReadyHandler),
    ]
    return with_document("muster agent", routes)


def make_app(services: Services, access: Access) -> Application:
    """The application of one agent."""
    return http.application(make_routes(), access=access, explain=explain, services=services)
