"""Logs: one JSON object a line, or text for people; which requests get a line; and what must never be in one."""

from __future__ import annotations

import logging
import re
import sys
import time
import zlib
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

import msgspec

Format = Literal["auto", "json", "text"]

_SECRETS = re.compile(
    r"(sluice_[0-9a-f]{8}_)[A-Za-z0-9_-]{43}|(://[^\s/:@]*:)[^\s/@]+(?=@)|([?&](?:ssl)?password=)[^\s&\"']+"
)
_encode = msgspec.json.Encoder(enc_hook=str).encode


def masked(text: str) -> str:
    """Take API keys and the passwords of URLs out of a text.

    Example:
        >>> masked("redis://me:hunter2@cache:6379 does not answer")
        'redis://me:***@cache:6379 does not answer'
        >>> masked("postgresql://db/events?user=me&password=hunter2&sslmode=require")
        'postgresql://db/events?user=me&password=***&sslmode=require'
    """
    if not ("sluice_" in text or "://" in text or "password=" in text):  # as in nearly all lines
        return text
    return _SECRETS.sub(lambda m: (m[1] or m[2] or m[3]) + "***", text)


class Record(logging.LogRecord):
    """A record for lines that every request leaves: it knows neither the place that it was made at nor the thread.

    To find those out costs more than to write the line.

    Args:
        name: of the logger that shall handle it.
        message: what is told, at level INFO.
        fields: besides.
    """

    def __init__(self, name: str, message: str, fields: dict[str, Any]) -> None:
        now = time.time()
        self.__dict__.update(_BLANK, name=name, msg=message, created=now, msecs=now % 1 * 1000, fields=fields)


_BLANK = vars(logging.LogRecord("", logging.INFO, "", 0, "", None, None))
_BLANK |= dict.fromkeys(("thread", "threadName", "process", "processName"))


class Json(logging.Formatter):
    """A record as a JSON object on one line, with what the call gives as ``extra={"fields": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03d}+00:00",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return masked(_encode(line).decode())


@lru_cache(maxsize=1)
def _second(since: int) -> str:
    return datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class Text(logging.Formatter):
    """A record for people: time, logger, message, then fields as ``name=value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the traceback behind it."""
        head, *rest = super().format(record).split("\n")
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        return masked("\n".join([head + fields, *rest]))


class Sampler:
    """Says which requests get a line: a share of them, told by their ids, so that every server chooses the same.

    Args:
        share: from 0 to 1.

    Example:
        >>> half = Sampler(0.5)
        >>> half.takes("r-1"), half.takes("r-1"), sum(half.takes(f"r-{i}") for i in range(1000)) // 100
        (False, False, 4)
    """

    def __init__(self, share: float) -> None:
        self._below = round(share * 2**32)

    def takes(self, request_id: str) -> bool:
        """Whether this one does."""
        return self._below == 2**32 or zlib.crc32(request_id.encode()) < self._below


def set_up(kind: Format = "auto", level: str = "info", *, worker: int | None = None) -> None:
    """Send the records of the server and of uvicorn to stderr.

    Args:
        kind: ``auto`` is text on a terminal, and JSON elsewhere.
        level: of what is told, from ``debug`` to ``error``.
        worker: the number of this process, if there are several; each line has it.
    """
    handler = logging.StreamHandler()
    if worker is not None:
        handler.addFilter(_Worker(worker))
    plain = kind == "text" or (kind == "auto" and sys.stderr.isatty())
    handler.setFormatter(Text() if plain else Json())
    for name, least in (("sluice", level.upper()), ("uvicorn", max(logging.WARNING, _number(level)))):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)


class _Worker(logging.Filter):
    """Adds the worker's number to the fields of each record."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def filter(self, record: logging.LogRecord) -> bool:
        record.fields = {**getattr(record, "fields", {}), "worker": self._number}
        return True


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
