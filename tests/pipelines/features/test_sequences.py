"""Histories hold what a user did strictly before, and nothing else."""

from __future__ import annotations

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features.sequences import Histories, add_histories
from pipelines.features.spec import FeatureSpec

LOGS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=30)


@settings(max_examples=300, deadline=None)
@given(log=LOGS, length=st.integers(1, 4))
def test_it_is_what_a_loop_over_the_rows_gives(log: list[tuple[int, int, bool]], length: int) -> None:
    user = np.array([u for u, _, _ in log], dtype=np.int64)
    time = np.array([t for _, t, _ in log], dtype=np.int64)
    event = np.array([e for _, _, e in log], dtype=bool)
    histories = Histories.of(user, time, event, length)
    taken = histories.take(histories.events.astype(np.int32), slice(None))
    for row, (u, t, _) in enumerate(log):
        earlier = [i for i, (v, s, e) in enumerate(log) if v == u != 0 and s < t and e]
        earlier.sort(key=lambda i: (log[i][1], i))
        got = taken.values[taken.offsets[row] : taken.offsets[row + 1]]
        assert got.tolist() == earlier[-length:]


def test_a_later_event_changes_no_earlier_row() -> None:
    user, time = np.ones(5, dtype=np.int64), np.arange(5)
    for late in (False, True):
        event = np.array([True, False, True, True, late])
        histories = Histories.of(user, time, event, 9)
        assert histories.lengths.tolist() == [0, 1, 1, 2, 3]


def test_raw_histories_can_be_sent_as_a_request() -> None:
    spec = FeatureSpec.model_validate(
        {
            "label": "click",
            "user": "u",
            "timestamp": "t",
            "columns": [
                {"name": "ad", "kind": "categorical"},
                {
                    "name": "clicked",
                    "kind": "sequence",
                    "table": "ad",
                    "max_length": 2,
                    "from_log": {"column": "ad"},
                },
                {
                    "name": "shown",
                    "kind": "sequence",
                    "table": "ad",
                    "from_log": {"column": "ad", "rows": "all"},
                },
                {
                    "name": "skipped",
                    "kind": "sequence",
                    "table": "ad",
                    "from_log": {"column": "ad", "rows": "skips"},
                },
            ],
        }
    )
    log = pl.DataFrame(
        {
            "click": [1, 0, 1, 1, 0],
            "u": ["x", "x", "x", "x", None],
            "t": ["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04", "2026-01-05"],
            "ad": ["a", "b", None, "c", "d"],
        }
    )
    out = add_histories(spec, log)
    assert out["clicked"].to_list() == [[], ["a"], ["a"], ["a"], []]
    assert out["shown"].to_list() == [[], ["a"], ["a", "b"], ["a", "b"], []]
    assert out["skipped"].to_list() == [[], [], ["b"], ["b"], []]
