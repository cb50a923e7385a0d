"""Sums by unit and arm, as the database makes them: who counts, and for what."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from pipelines.experiments.rates import Sums
from serving.totals import Span, Totals, scored, totals

NOW = datetime(2026, 11, 10, tzinfo=UTC)
HOUR = timedelta(hours=1)
ARMS = ("open", "gated")


def summed(filled: Any, **more: Any) -> tuple[dict[str, Totals], int]:
    return totals(filled.database, span(**more), ARMS)


def span(**more: Any) -> Span:
    return Span.of("gates", **{"since": NOW, "until": NOW + 48 * HOUR, **more})


def test_sums_are_those_of_the_units(filled: Any) -> None:
    rng = np.random.default_rng(0)
    clicked: dict[str, list[tuple[int, int]]] = {"open": [], "gated": []}
    for i in range(30):
        arm, x, n = ARMS[i % 2], 0, 0
        for _ in range(int(rng.integers(1, 5))):
            shown = int(rng.integers(1, 20))
            request = filled.show(arm, f"u{i}", NOW + HOUR, shown=shown)
            for place in np.flatnonzero(rng.random(shown) < 0.3).tolist():
                filled.happen(NOW + 2 * HOUR, request_id=request, candidate=place)
                x += 1
            n += shown
        clicked[arm].append((x, n))
    found, mixed = summed(filled)
    assert mixed == 0
    for arm, pairs in clicked.items():
        x, n = np.array(pairs).T
        assert found[arm].ctr == Sums.of(x, n)
        assert (found[arm].units, found[arm].shown, found[arm].clicks) == (15, n.sum(), x.sum())
        assert found[arm].conversion_rate == Sums.of(0 * x, n)


def test_a_candidate_has_each_kind_of_event_once_and_only_within_the_window(filled: Any) -> None:
    request = filled.show("open", "u", NOW + HOUR, shown=5)
    for hours in (1, 2, 24.9):
        filled.happen(NOW + hours * HOUR, request_id=request, candidate=2)
    filled.happen(NOW + 2 * HOUR, "conversion", request_id=request, candidate=2)
    filled.happen(NOW + 2 * HOUR, request_id=request, item="sun")
    filled.happen(NOW + 57 / 60 * HOUR, request_id=request, candidate=3)  # of a clock that is behind
    filled.happen(NOW + 0.5 * HOUR, request_id=request, candidate=4)
    filled.happen(NOW + 26 * HOUR, request_id=request, candidate=4)
    filled.happen(NOW + 2 * HOUR, request_id=request, candidate=5)  # there is no such place
    filled.happen(NOW + 2 * HOUR, "skip", request_id=request, candidate=1)
    filled.happen(NOW + 2 * HOUR, request_id="of nobody", candidate=1)
    found, _ = summed(filled)
    assert (found["open"].clicks, found["open"].conversions) == (3, 1)
    assert summed(filled, window=2 * HOUR)[0]["open"].clicks == 3
    assert summed(filled, window=timedelta(minutes=30))[0]["open"].clicks == 2
    assert set(found) == {"open"}


def test_a_candidate_that_is_named_by_its_place_and_by_its_item_has_its_click_once(filled: Any) -> None:
    request = filled.offer("open", "u", NOW + HOUR, ["sun", None, "moon", "sun", "0"])
    for named in ({"candidate": 2}, {"item": "moon"}, {"candidate": 2, "item": "moon"}):
        filled.happen(NOW + 2 * HOUR, request_id=request, **named)
    filled.happen(NOW + 2 * HOUR, unit="u", item="moon")
    assert summed(filled)[0]["open"].clicks == 1
    filled.happen(NOW + 2 * HOUR, request_id=request, item="sun")
    assert summed(filled)[0]["open"].clicks == 2
    filled.happen(NOW + 2 * HOUR, request_id=request, candidate=0)  # the first place of the sun
    assert summed(filled)[0]["open"].clicks == 2
    filled.happen(NOW + 2 * HOUR, request_id=request, candidate=3)  # the sun stands there twice
    filled.happen(NOW + 2 * HOUR, request_id=request, item="0")  # an item, and no place
    filled.happen(NOW + 2 * HOUR, "conversion", request_id=request, item="moon")  # another kind of event
    found = summed(filled)[0]["open"]
    assert (found.clicks, found.conversions, found.ctr) == (4, 1, Sums.of(np.array([4]), np.array([5])))


@pytest.mark.parametrize("items", [None, ["sun", "moon"]])
def test_an_item_that_is_no_candidate_of_the_request_is_a_click_of_its_own(filled: Any, items: Any) -> None:
    request = filled.offer("open", "u", NOW + HOUR, items)
    for named in ({"candidate": 1}, {"item": "mars"}, {"item": "mars"}):
        filled.happen(NOW + 2 * HOUR, request_id=request, **named)
    assert summed(filled)[0]["open"].clicks == 2


def test_an_event_of_unit_and_item_counts_for_the_last_exposure_of_the_unit(filled: Any) -> None:
    for hours in (1, 3):
        filled.show("gated", "u", NOW + hours * HOUR)
    for hours in (0.9, 2, 2.5, 4):
        filled.happen(NOW + hours * HOUR, "conversion", unit="u", item="sun")
    filled.happen(NOW + 4 * HOUR, "conversion", unit="somebody", item="sun")
    found, _ = summed(filled)
    assert (found["gated"].conversions, found["gated"].requests) == (2, 2)


def test_a_request_that_is_sent_again_and_again_has_its_event_once(filled: Any) -> None:
    for minutes in range(50):
        filled.show("open", "u", NOW + minutes * HOUR / 60, request="same")
    for minutes in (10.5, 10.6, 20.5):
        filled.happen(NOW + minutes * HOUR / 60, request_id="same", candidate=1)
    found, _ = summed(filled)
    # A clock may be behind by some minutes, so that what it says came before may have come after.
    assert (found["open"].clicks, found["open"].requests, found["open"].units) == (2, 50, 1)


def test_units_of_several_arms_count_in_none_and_other_stages_and_experiments_not_at_all(filled: Any) -> None:
    for arm, unit in (("open", "u"), ("gated", "u"), ("gated", "v")):
        filled.happen(NOW + 2 * HOUR, request_id=filled.show(arm, unit, NOW + HOUR), candidate=0)
    early = filled.show("open", "w", NOW - HOUR)
    filled.happen(NOW + HOUR, request_id=early, candidate=0)
    other = type(filled)(filled.database, "other")
    other.show("open", "w", NOW + HOUR, request="elsewhere")
    found, mixed = summed(filled)
    assert (set(found), mixed, found["gated"].clicks, found["gated"].units) == ({"gated"}, 1, 1, 1)
    late, _ = summed(filled, since=NOW - 2 * HOUR, until=NOW + 0.5 * HOUR)
    assert (late["open"].units, late["open"].clicks) == (1, 0)


def test_what_came_after_the_last_exposure_counts_within_the_window(filled: Any) -> None:
    request = filled.show("open", "u", NOW + HOUR)
    for hours, place in ((3, 0), (26, 1)):
        filled.happen(NOW + hours * HOUR, "conversion", request_id=request, candidate=place)
    ended = {"until": NOW + 2 * HOUR}
    known = [{}, {"known": NOW + 4 * HOUR}, {"known": NOW + 48 * HOUR}]
    assert [summed(filled, **ended, **more)[0]["open"].conversions for more in known] == [0, 1, 1]


def test_what_shadow_arms_scored_is_counted_and_nothing_came_of_it(filled: Any) -> None:
    for i in range(3):
        for arm in ARMS:
            filled.show(arm, f"u{i % 2}", NOW + HOUR, request=f"r{i}", shown=4)
    filled.happen(NOW + 2 * HOUR, request_id="r0", candidate=0)
    assert scored(filled.database, span(), ARMS) == dict.fromkeys(ARMS, Totals(2, 3, 12))
    assert scored(filled.database, span(), ["open"])["open"].clicks == 0
    assert scored(filled.database, span(until=NOW), ARMS) == {}
