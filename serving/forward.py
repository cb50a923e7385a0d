"""The forward pass: the ways in which a bundle can compute it, and which is the fastest for how many rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ctr_models.batch import EncodedRows
from ctr_models.candidates import Candidates, joined_rows
from ctr_models.export import tensors
from ctr_models.int8 import Int8, supported
from ctr_models.model import CTRModel
from ctr_models.program import CandidateScores, RowScores, candidate_tensors, filled, folded, traced
from ctr_models.schema import Schema
from pipelines.release.bundle import SCORE, TOLERANCE
from pipelines.release.int8 import LARGEST
from serving.batching import Encoded

if TYPE_CHECKING:
    from pipelines.release.bundle import Bundle
    from pipelines.release.int8 import Int8Card

log = logging.getLogger("sluice.models")

MEASURED_ROWS = (1, 100, 500)
"""Candidates of the requests that are timed."""
ROUNDS, MOST_SECONDS = 5, 0.1
"""Timed calls of a way, of which the best counts; those after so many seconds are left out."""

Way = Callable[[Sequence[Encoded]], Tensor]
"""Scores requests that fit each other in one pass: probabilities of all candidates, (N,)."""


class Forward:
    """A bundle's forward pass, by the way that was measured to be the fastest for the number of rows.

    ``eager`` runs the model as it is, with what candidates share computed once a user. ``traced`` is the model as
    TorchScript programs, which compute that once a user too: Python does not slow them down, nor do they keep
    Python from other work. They exist for models that can be traced for any number of rows, from schemas without
    lists, and only if they give the golden rows their scores. Requests that divide the fields otherwise than the
    example, such as those whose candidates each bring the hour, are computed by a program of plain rows, in which
    what is shared is repeated. ``int8`` is such a program with the layers in eight bits that the bundle names; it
    must give the golden rows their scores within 1e-3.

    Args:
        bundle: verified.
        example: told a number of candidates, returns an encoded request.
        golden: the golden rows, an encoded request each.
        int8: whether that way may be taken.

    Attributes:
        seconds: of a pass of each measured size, by way.
    """

    def __init__(
        self,
        bundle: Bundle,
        example: Callable[[int], Encoded],
        golden: Sequence[Encoded],
        *,
        int8: bool = False,
    ) -> None:
        self.model = bundle.model
        self.ways: dict[str, Way] = {"eager": self._eager}
        if program := _traced(bundle, example, golden):
            self.ways["traced"] = program
        eight = bundle.int8 if int8 and supported() else None
        if eight is not None and (program := _traced(bundle, example, golden, eight)):
            self.ways["int8"] = program
        self.seconds = {name: _measure(way, example) for name, way in self.ways.items()}
        self._expected: dict[int, tuple[str, float]] = {}

    def __call__(self, requests: Sequence[Encoded]) -> np.ndarray:
        """Return the click probabilities of all candidates, one request after the other, (N,) float32."""
        name, _ = self.expected(sum(len(r) for r in requests))
        with torch.inference_mode():
            return self.ways[name](requests).numpy()

    def expected(self, rows: int) -> tuple[str, float]:
        """Return the way that a pass of so many rows takes, and its seconds as they were measured."""
        found = self._expected.get(rows)  # it is asked several times a request
        if found is None:
            each = ((name, _between(times, rows)) for name, times in self.seconds.items())
            found = self._expected[rows] = min(each, key=lambda one: one[1])
        return found

    def told(self) -> dict[str, Any]:
        """Return what was measured, for people: the chosen way and milliseconds, by rows."""
        return {
            str(rows): {
                "chosen": self.expected(rows)[0],
                "milliseconds": {name: round(1000 * times[rows], 3) for name, times in self.seconds.items()},
            }
            for rows in MEASURED_ROWS
        }

    def _eager(self, requests: Sequence[Encoded]) -> Tensor:
        own = EncodedRows.concat([r.own for r in requests])
        shared = [r.shared for r in requests if r.shared is not None]
        if shared:
            counts = [len(r) for r in requests]
            return torch.sigmoid(self.model.scores(Candidates.of(EncodedRows.concat(shared), own, counts)).float())
        return torch.sigmoid(self.model(own.batch()).float())


def _traced(
    bundle: Bundle, example: Callable[[int], Encoded], golden: Sequence[Encoded], int8: Int8Card | None = None
) -> Way | None:
    """Return the model as a program, or None if it can't be had or does not give the golden rows their scores."""
    model, schema = bundle.model, bundle.model.schema
    if schema.sequences or any(f.kind != "categorical" for f in schema.sparse):
        return None  # a trace holds the numbers of ids that it has seen
    kind, tolerance = ("traced", TOLERANCE) if int8 is None else ("in int8", LARGEST)
    try:
        way = _Programs(model, example) if int8 is None else _Rows(model, example, int8)
        expected = bundle.golden[SCORE].to_numpy()
        with torch.inference_mode():
            way(golden)  # the second call of a program is the one that makes it fast, and takes its time
            found = [way(golden[i : i + 1]).numpy() for i in range(2)] + [way(golden).numpy()]
        apart = float(np.abs(np.concatenate(found) - np.concatenate([expected[:2], expected])).max())
        if not apart <= tolerance:
            log.info("%s: not %s, its scores of golden rows are %.1e apart", bundle.hash[:12], kind, apart)
            return None
    except Exception as error:  # whatever a model of somebody else's does in a trace: it runs as it is
        log.info("%s: not %s: %s", bundle.hash[:12], kind, str(error).strip().splitlines()[-1:])
        return None
    return way


class _Rows:
    """A model as one program, of plain rows.

    Args:
        model: without lists.
        example: as of :class:`Forward`.
        int8: the layers to compute in eight bits; None: none.
    """

    def __init__(self, model: CTRModel, example: Callable[[int], Encoded], int8: Int8Card | None = None) -> None:
        self.schema, scores = model.schema, RowScores(model).eval()
        modes = () if int8 is None else (Int8(model, int8.ranges, scores),)
        self.program = traced(scores, tensors(plain(self.schema, [example(3)]).batch()), *modes)

    def __call__(self, requests: Sequence[Encoded]) -> Tensor:
        rows = plain(self.schema, requests)
        return self.program(*tensors(filled(rows).batch()))[: len(rows)]


class _Programs:
    """A model as programs: of one user's candidates, of several users', and of plain rows for all other requests.

    Args:
        model: without lists.
        example: as of :class:`Forward`; says also which fields candidates mostly share.
    """

    def __init__(self, model: CTRModel, example: Callable[[int], Encoded]) -> None:
        model = folded(model)
        self.rows = _Rows(model, example)
        one = example(3)
        self.own: Schema | None = None
        if one.shared is not None:
            self.own = one.own.schema
            scores = CandidateScores(model, one.shared.schema, self.own)
            self.one, self.several = (traced(scores, _candidates([one] * users)) for users in (1, 2))

    def __call__(self, requests: Sequence[Encoded]) -> Tensor:
        if requests[0].own.schema is not self.own:
            return self.rows(requests)
        program = self.one if len(requests) == 1 else self.several
        return program(*_candidates(requests))[: sum(len(r) for r in requests)]


def _candidates(requests: Sequence[Encoded]) -> tuple[Tensor, ...]:
    shared = EncodedRows.concat([r.shared for r in requests if r.shared is not None])
    own = filled(EncodedRows.concat([r.own for r in requests]))
    return candidate_tensors(shared, own, [len(r) for r in requests])


def plain(schema: Schema, requests: Sequence[Encoded]) -> EncodedRows:
    """Return the candidates of requests as plain rows, in which what they share is repeated."""
    own = EncodedRows.concat([r.own for r in requests])
    shared = [r.shared for r in requests if r.shared is not None]
    if not shared:
        return own
    return joined_rows(schema, EncodedRows.concat(shared), own, [len(r) for r in requests])


def _measure(way: Way, example: Callable[[int], Encoded]) -> dict[int, float]:
    """Return the seconds of a pass by number of rows, the best of some; the calls before have warmed up."""
    times = {}
    for rows in MEASURED_ROWS:
        request, taken = [example(rows)], list[float]()
        while len(taken) < 2 or (len(taken) < 2 + ROUNDS and sum(taken) < MOST_SECONDS):
            begin = time.perf_counter()
            with torch.inference_mode():
                way(request)
            taken.append(time.perf_counter() - begin)
        times[rows] = min(taken[1:])
    return times


def _between(times: dict[int, float], rows: int) -> float:
    """Return the seconds for any number of rows, linear between those measured and beyond."""
    points = sorted(times.items())
    for (few, quick), (many, slow) in pairwise(points):
        if rows <= many or many == points[-1][0]:
            return max(quick if rows > few else 0.0, quick + (rows - few) * (slow - quick) / (many - few))
    raise AssertionError("at least two sizes are measured")
