"""The short way to the endpoints that are asked most: past the framework, which declares and documents them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.schemas import Refused


class Direct:
    """ASGI middleware: calls the endpoints of some routes itself; everything else goes to FastAPI.

    FastAPI's search for a route, its dependencies and handlers cost as much as the rest of what the server does for
    a small request. Such an endpoint takes the request and the texts of its path, reads its other parameters itself
    and returns a response, so that FastAPI would call it no differently, and does so wherever this is left out.

    Args:
        app: the way through FastAPI.
        routes: of POST, those that are asked most first.
        refuse: answers a request that its endpoint refuses.
    """

    def __init__(
        self, app: ASGIApp, routes: Iterable[APIRoute], refuse: Callable[[Request, Refused], Awaitable[Response]]
    ) -> None:
        self.app, self._refuse = app, refuse
        self._routes = [(route.path_regex.match, route) for route in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for match, route in self._routes if scope["type"] == "http" and scope["method"] == "POST" else ():
            found = match(scope["path"])
            if found is None:
                continue
            scope["route"] = route
            request = Request(scope, receive)
            try:
                reply = await route.endpoint(request, **found.groupdict())
            except Refused as error:
                reply = await self._refuse(request, error)
            await reply(scope, receive, send)
            return
        await self.app(scope, receive, send)
