"""Applications over real connections."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from serving.connections import protocol


@contextmanager
def _listening(app: Any, **limits: Any) -> Iterator[int]:
    """Serve an application as ``sluice serve`` does, on a thread; yield its port once it is ready."""
    options = {"http": protocol(**{"seconds": 30.0, "most": 100, **limits})}
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    try:
        end = time.monotonic() + 60
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            while not server.started or client.get("/readyz").status_code != 200:
                assert time.monotonic() < end
                time.sleep(0.02)
        yield port
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def listening() -> Callable[..., AbstractContextManager[int]]:
    """A function that serves an application over real connections."""
    return _listening
