"""One server process: takes the port, loads the model, serves, and stops politely."""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
import threading
import time
from typing import Any

import uvicorn
from rich.console import Console
from rich.text import Text

from ctr_models.errors import ConfigError
from serving import logs
from serving.app import create_app
from serving.connections import protocol
from serving.models import Models
from serving.settings import Settings


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered first.

    Raises:
        ConfigError: the address can't be listened on.
        ArtifactError: the model can't be loaded.
    """
    logs.set_up(settings.log_format, settings.log_level)
    screen = Console(stderr=True)
    listener = listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    failures: list[Exception] = []

    def ready(models: Models) -> None:
        address = f"http://{host}:{port}" if ":" not in host else f"http://[{host}]:{port}"
        for slot in models.slots:
            card = models.scorer(slot).card
            shown = f"{card.name} version {card.version}" if card.version is not None else card.name
            where = f" as {slot}" if len(models.slots) > 1 else ""
            line = Text.assemble(
                (shown, "bold"), f" ({card.hash[:12]}){where} on ", (address, "bold cyan"), ", docs at /docs"
            )
            screen.print(line, soft_wrap=True)
        if settings.keys is None and not ipaddress.ip_address(host).is_loopback:
            screen.print("[yellow]Whoever reaches this address may use it:[/] give --keys, see sluice keys --help")

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, on_ready=ready, on_failure=failed)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol(seconds=settings.receive_seconds, most=settings.max_connections),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
            server_header=False,
        )
    )

    def stop(*_: Any) -> None:
        server.should_exit = True

    # uvicorn raises the signal once more after it has stopped; with a handler of ours that means exit code 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if settings.parent is not None:
        threading.Thread(target=_follow, args=(settings.parent,), daemon=True).start()
    with listener:
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the port is taken, not allowed, or the address is not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"no such address ({error.strerror})", where=f"--host {host}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        where = f"{host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                "the port is taken", where=where, remedy="give another with --port; 0 takes any"
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigError("the port needs privileges", where=where, remedy="give one above 1023") from None
        raise ConfigError(f"can't listen here ({error.strerror})", where=where) from None
    return listener


def _follow(parent: int) -> None:
    """Stop this process once it is no longer the child of ``parent``, as a SIGTERM would."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
