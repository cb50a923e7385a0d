"""The metrics of a server's workers, as one: whichever worker is asked, it asks the others."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.monitoring import Metrics

SECONDS = 1.0
"""That a worker may take to tell its metrics."""
_SAMPLE = re.compile(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{)?", re.MULTILINE)
_FAMILY = re.compile(rb"^(?=# HELP )", re.MULTILINE)


@dataclass(frozen=True)
class Place:
    """A worker's place among its siblings.

    Args:
        number: from 0.
        of: how many there are.
        folder: where their sockets are, closed to other users.
    """

    number: int
    of: int
    folder: Path

    def socket(self, number: int) -> Path:
        """Return the path of a worker's socket."""
        return self.folder / f"{number}.sock"


class Siblings:
    """Tells the metrics of this worker to the others, and theirs to whoever asks.

    Each sample keeps a label ``worker``: a sum made here would fall when a worker is restarted, and a rate over it
    would count everything twice.

    Args:
        place: of this worker.
        metrics: of this worker.
    """

    def __init__(self, place: Place, metrics: Metrics) -> None:
        self._place, self._metrics = place, metrics
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen to the others."""
        path = self._place.socket(self._place.number)
        path.unlink(missing_ok=True)  # of the one that died
        self._server = await asyncio.start_unix_server(self._tell, path)

    async def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def exposition(self) -> bytes:
        """Return the metrics of all workers in Prometheus' text format; of those that don't answer, only that."""
        own = self._place.number
        others = [number for number in range(self._place.of) if number != own]
        told = await asyncio.gather(*map(self._ask, others))
        answers = {own: self._metrics.exposition(), **dict(zip(others, told, strict=True))}
        return merged({number: answers[number] for number in sorted(answers)})

    async def _ask(self, number: int) -> bytes | None:
        try:
            async with asyncio.timeout(SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._place.socket(number))
                try:
                    return await reader.read()
                finally:
                    writer.close()
        except OSError:  # a timeout is one
            return None

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._metrics.exposition())
        writer.close()


def merged(expositions: Mapping[int, bytes | None]) -> bytes:
    """Put the metrics of workers together, family by family, each sample with its worker.

    Args:
        expositions: by worker; None of one that did not answer.

    Example:
        >>> one = b"# HELP rows Waiting.\\n# TYPE rows gauge\\nrows 2.0\\n"
        >>> print(merged({0: one, 1: None}).decode(), end="")
        # HELP sluice_worker_up Whether the worker answers.
        # TYPE sluice_worker_up gauge
        sluice_worker_up{worker="0"} 1
        sluice_worker_up{worker="1"} 0
        # HELP rows Waiting.
        # TYPE rows gauge
        rows{worker="0"} 2.0
    """
    up = b"# HELP sluice_worker_up Whether the worker answers.\n# TYPE sluice_worker_up gauge\n"
    families: dict[bytes, list[bytes]] = {}
    for number, text in expositions.items():
        up += b'sluice_worker_up{worker="%d"} %d\n' % (number, text is not None)
        for block in _FAMILY.split(text or b"")[1:]:
            help_line, type_line, samples = block.split(b"\n", 2)
            head = help_line + b"\n" + type_line + b"\n"
            families.setdefault(head, []).append(_labelled(samples, number))
    return up + b"".join(head + b"".join(parts) for head, parts in families.items())


def _labelled(samples: bytes, number: int) -> bytes:
    label = b'{worker="%d"' % number
    return _SAMPLE.sub(lambda match: match[1] + label + (b"," if match[2] else b"}"), samples)
