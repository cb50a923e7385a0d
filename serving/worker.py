"""A worker process of ``sluice serve --workers``; :class:`serving.workers.Workers` starts it.

Stdin brings one line of JSON, which says what to do, and ends when the supervisor does, however that comes about:
the worker then stops as by SIGTERM. Stdout gets one line of JSON, once the worker is ready or knows that it is not.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> int:
    """Serve until told to stop; return the exit code."""
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
    try:
        serve(settings, socket.socket(fileno=told["listener"]), lambda cards: _tell(cards=cards), place=place)
    except SluiceError as error:
        _tell(problem=error.problem, where=error.where, remedy=error.remedy)
        return 2
    return 0


def _tell(**what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _follow() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
