"""The server: takes the port, loads the models, serves in one process or several, and stops politely."""

from __future__ import annotations

import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from rich.console import Console
from rich.text import Text

from ctr_models.errors import ConfigError
from ctr_models.memory import keep_freed_memory
from serving import logs
from serving.drain import Drain
from serving.settings import Settings
from serving.siblings import Place
from serving.workers import Cards, Workers

log = logging.getLogger("sluice.server")
SWITCH_SECONDS = 0.0005
"""After which a thread that is done with a pass, or with a row on disk, gets Python's lock from a busy event loop.
Python's own 5 ms would be several times what a small pass takes."""
GARBAGE = 10_000
"""Containers made since the last collection from which there is one. The requests of 64 clients hold more than
Python's own 700 all the time, and none of them is garbage: to look at them took a twentieth of the time."""
ACCEPTED = 32
"""Connections that may be accepted in a turn of the event loop."""


def run(settings: Settings) -> int:
    """Serve until SIGTERM, SIGINT, or the end of the terminal; requests in flight are answered first.

    Returns:
        the exit code: 0, or 1 if a worker did not end well or in time.

    Raises:
        ConfigError: the address can't be listened on.
        ArtifactError: the model can't be loaded.
    """
    logs.set_up(settings.log_format, settings.log_level)
    gc.freeze()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with listen(settings.host, settings.port) as listener:

        def ready(cards: Cards) -> None:
            _show(settings, listener, cards)

        if settings.workers > 1:
            return Workers(settings, listener, ready).run()
        if settings.parent is not None:
            threading.Thread(target=_follow, args=(settings.parent,), daemon=True).start()
        serve(settings, listener, ready)
    return 0


def serve(
    settings: Settings, listener: socket.socket, on_ready: Callable[[Cards], None], *, place: Place | None = None
) -> None:
    """Serve in this process.

    Args:
        settings: of the deployment.
        listener: a listening socket.
        on_ready: called with the models' cards once all are loaded.
        place: among other workers, if there are any; connections then wait until the models are loaded.

    Raises:
        ArtifactError: a model can't be loaded.
    """
    from serving.app import create_app
    from serving.connections import protocol
    from serving.models import Models

    # What was imported is never garbage: collections leave it out, the one at the end too, which took seconds.
    gc.freeze()
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.set_threshold(GARBAGE)
    failures: list[Exception] = []
    # uvloop accepts one connection a turn and listener. Under load a turn is long, and newcomers would wait.
    listener.setblocking(False)  # copies take that over, and set it for all processes that share the socket
    sockets = [listener, *(listener.dup() for _ in range(ACCEPTED - 1))]

    def ready(models: Models) -> None:
        # Nor are the first models, the application and its routes: what is left takes a millisecond to look at.
        gc.collect()
        gc.freeze()
        on_ready([{"slot": name, **models.scorer(name).card.model_dump()} for name in models.slots])

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True
        if place is not None:
            sockets.clear()  # nobody listens yet, and then nobody begins to

    app = create_app(settings, on_ready=ready, on_failure=failed, place=place)
    config = uvicorn.Config(
        app,
        http=protocol(seconds=settings.receive_seconds, most=settings.max_connections, door=app.state.door),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,  # nothing is in hand by then, unless its time is up
        server_header=False,
    )
    server = _Server(config, app.state.drain, seconds=settings.drain_seconds, grace=settings.grace_seconds)
    server.run(sockets=sockets)
    if failures:
        raise failures[0]


class _Server(uvicorn.Server):
    """uvicorn's server, which goes on listening while it drains, and refuses what is new.

    Args:
        config: of uvicorn.
        drain: of the application.
        seconds: to go on at least, so that load balancers notice.
        grace: that requests in hand may take beyond those.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, *, seconds: float, grace: float) -> None:
        super().__init__(config)
        self._drain, self._seconds, self._grace = drain, seconds, grace
        self._begun = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; end at once when told again. Whoever sits at a terminal does not wait for balancers."""
        if self._drain.begun:
            self.should_exit = True
            return
        if sig == signal.SIGINT:
            self._seconds = 0.0
        self._begun = time.monotonic()
        self._drain.begin()
        log.info("draining", extra={"fields": {"in_hand": self._drain.in_hand}})

    async def on_tick(self, counter: int) -> bool:
        """Say whether to stop now."""
        done = await super().on_tick(counter)
        if done or not self._drain.begun:
            return done
        past = time.monotonic() - self._begun - self._seconds
        if past >= self._grace and self._drain.in_hand:
            log.error("the time to drain is up", extra={"fields": {"in_hand": self._drain.in_hand}})
            return True
        return past >= 0 and not self._drain.in_hand


def _show(settings: Settings, listener: socket.socket, cards: Cards) -> None:
    """Tell a person at the terminal what answers where; a log gets a line of it."""
    host, port = listener.getsockname()[:2]
    address = f"http://{host}:{port}" if ":" not in host else f"http://[{host}]:{port}"
    screen = Console(stderr=True)
    for card in cards:
        shown = f"{card['name']} version {card['version']}" if card["version"] is not None else card["name"]
        where = f" as {card['slot']}" if len(cards) > 1 else ""
        if sys.stderr.isatty():
            parts = (shown, "bold"), f" ({card['hash'][:12]}){where} on ", (address, "bold cyan"), ", docs at /docs"
            screen.print(Text.assemble(*parts), soft_wrap=True)
        else:
            log.info("%s%s on %s", shown, where, address, extra={"fields": {"hash": card["hash"]}})
    if settings.events_url is not None:
        where = _place(settings.events_url)
        if sys.stderr.isatty():
            screen.print(
                Text(f"exposures and events are kept in {where} (--events none keeps none)"), soft_wrap=True
            )
        else:
            log.info("exposures and events are kept in %s", where)
    if settings.keys is None and not ipaddress.ip_address(host).is_loopback:
        if sys.stderr.isatty():
            text = "[yellow]Whoever reaches this address may use it:[/] give --keys, see sluice keys --help"
            screen.print(text, soft_wrap=True)
        else:
            log.warning("no keys: whoever reaches %s may use it; give --keys, see sluice keys --help", address)


def _place(url: str) -> str:
    """Say where a database is: of SQLite the whole path, of a server the address without its password."""
    path = url.removeprefix("sqlite:///")
    return os.path.abspath(path) if path != url else logs.masked(url)


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
