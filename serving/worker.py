"""A worker process of ``sluice serve --workers``; :class:`serving.workers.Workers` starts it.

Stdin brings one line of JSON, which says what to do, and ends when the supervisor does, however that comes about:
the worker then stops as by SIGTERM. Stdout gets one line of JSON, once the worker is ready or knows that it is not;
then an empty line each second, by which the event loop tells that it still turns. What is printed goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

BEAT_SECONDS = 1.0


def main() -> int:
    """Serve until told to stop; return the exit code."""
    supervisor = os.dup(1)
    os.dup2(2, 1)
    told = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_follow, name="supervisor", daemon=True).start()
    from ctr_models.errors import SluiceError
    from serving import logs
    from serving.server import serve
    from serving.settings import Settings
    from serving.siblings import Place

    settings = Settings.model_validate(told["settings"])
    place = Place(told["number"], settings.workers, Path(told["folder"]))
    logs.set_up(settings.log_format, settings.log_level, worker=place.number)

    def ready(cards: Any) -> None:
        _tell(supervisor, cards=cards)
        os.set_blocking(supervisor, False)
        _beat(supervisor, asyncio.get_running_loop())

    try:
        serve(settings, socket.socket(fileno=told["listener"]), ready, place=place)
    except SluiceError as error:
        _tell(supervisor, problem=error.problem, where=error.where, remedy=error.remedy)
        return 2
    return 0


def _tell(supervisor: int, **what: Any) -> None:
    os.write(supervisor, json.dumps(what).encode() + b"\n")


def _beat(supervisor: int, loop: asyncio.AbstractEventLoop) -> None:
    with suppress(OSError):  # it does not listen now, or has gone
        os.write(supervisor, b"\n")
    loop.call_later(BEAT_SECONDS, _beat, supervisor, loop)


def _follow() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
