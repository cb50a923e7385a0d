"""The click world: a simulated log whose true click probabilities are known. It needs no files."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from ctr_models.errors import DataError
from pipelines.datasets.base import Dataset, DatasetOptions, RawData, RawPart, clicked_before, register_dataset
from pipelines.datasets.click_world_conversions import CONVERSION, CONVERSION_TRUTH, Conversions
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import fingerprint, scan_parquet
from pipelines.datasets.logit import Logit
from pipelines.features.files import atomic_directory, atomic_write
from pipelines.features.spec import Column, FeatureSpec, Quantile, Standard, Vocabulary

FIRST_DAY = date(2026, 1, 1)
TRUTH = "true_probability"
_VERSION = 1
"""Part of every world's identity; raise it when the same options would give other rows."""
_CARD = "world.json"
_SLATE = 5
"""Items shown together, at positions 1 to 5."""

SEGMENTS = tuple(f"segment-{i}" for i in range(8))
AGES = ("under-18", "18-24", "25-34", "35-49", "50-64", "65-up")
CITIES = tuple(f"city-{i:02d}" for i in range(60))
CATEGORIES = tuple(f"category-{i:02d}" for i in range(16))
BRANDS = tuple(f"brand-{i:03d}" for i in range(120))
TAGS = tuple(f"tag-{i:02d}" for i in range(40))
DEVICES = ("phone", "tablet", "desktop", "tv")
CHANNELS = ("home", "search", "feed", "mail")
CAMPAIGNS = tuple(f"campaign-{i:03d}" for i in range(500))
_TASTE = 2
"""Dimension of the latent tastes."""
_RANK = 2
"""Rank of the interaction tables: what a model with embeddings can express."""

WEIGHTS = {
    "quality": 0.35,
    "position": 0.40,
    "city": 0.20,
    "segment x category": 0.60,
    "daypart x category x device": 0.35,
    "taste": 0.35,
    "price | segment": 0.65,
    "brand | category": 0.60,
    "tags | device, channel": 0.50,
    "rating | age": 0.45,
}
"""Standard deviation, over rows, of each term of the logit at strength 1. ``a x b`` is an interaction of that
order; ``a | b`` is an effect of a that exists only for some values of b."""


class ClickWorldOptions(DatasetOptions):
    """Size and character of the world; together they decide every byte of it."""

    rows: int = Field(400_000, ge=1)
    users: int = Field(2_000, ge=10)
    items: int = Field(600, ge=20)
    days: int = Field(14, ge=1, le=3650)
    seed: int = Field(2026, ge=0)
    strength: float = Field(1.0, ge=0, le=10)
    """Multiplies the logit's spread; at 0 every row has the same probability."""
    drift: float = Field(1.0, ge=0, le=10)
    """How fast tastes turn: at 1 a user's taste comes round in 30 to 90 days."""
    click_rate: float = Field(0.2, gt=0, lt=1)
    conversion_rate: float | None = Field(None, gt=0, lt=1)
    """Of the clicks: adds the task ``conversion``, unknown without a click, and its true probability."""
    until_day: int | None = Field(None, ge=1)
    """Read only the first so many days: how far the world has come."""
    until: date | None = None
    """The same by date, that day included; the first day is 2026-01-01."""

    @model_validator(mode="after")
    def _one_end(self) -> ClickWorldOptions:
        if self.until_day is not None and self.until is not None:
            raise ValueError("until_day and until say the same; give one")
        if self.rows < self.days:
            raise ValueError("rows must be at least one a day")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A world without conversions is the one that it was before there were any.
        tree = write(self)
        if self.conversion_rate is None:
            tree.pop("conversion_rate", None)
        return tree

    @property
    def last_day(self) -> int:
        """Days that are read, 1 to ``days``; less than 1 when ``until`` is before the first."""
        if self.until is not None:
            return min((self.until - FIRST_DAY).days + 1, self.days)
        return min(self.until_day or self.days, self.days)

    def world(self) -> dict[str, Any]:
        """What decides the rows: everything but how far they are read."""
        return {"version": _VERSION, **self.model_dump(exclude={"until_day", "until"})}


class World:
    """Users, items and what makes the users click.

    The probability of a click is sigmoid(intercept + strength * sum of the terms in :data:`WEIGHTS`). Each
    term is a table look-up or a product, scaled to its weight's deviation; the intercept sets the click rate.
    A user's taste turns in its plane, t_u(d) = a_u cos(w_u d + p_u) + b_u sin(w_u d + p_u), and meets the
    item's vector. Half of the brands and tags, nine tenths of the cities and every campaign change nothing.
    With a conversion rate, clicks are followed by conversions (:class:`Conversions`).

    Args:
        options: the world's size, character and seed.

    Example:
        >>> world = World(ClickWorldOptions(rows=700, users=50, items=40, days=7))
        >>> frame = world.day(0)
        >>> len(frame), frame["time"].dt.date().unique().to_list()
        (100, [datetime.date(2026, 1, 1)])
    """

    def __init__(self, options: ClickWorldOptions) -> None:
        self.options = options
        make = self._generator(0)
        users, items = options.users, options.items
        self.segment = make.integers(0, len(SEGMENTS), users)
        self.age = make.integers(0, len(AGES), users)
        self.city = _draw(make, make.pareto(1.2, len(CITIES)) + 0.2, users)
        self.device = _draw(make, np.array([0.55, 0.1, 0.25, 0.1]), users)
        self.activity = np.exp(0.8 * make.standard_normal(users))
        self.taste = make.standard_normal((users, 2, _TASTE))
        self.turn = options.drift * 2 * np.pi / make.uniform(30, 90, users)  # radians a day
        self.phase = make.uniform(0, 2 * np.pi, users)

        self.category = make.integers(0, len(CATEGORIES), items)
        # A brand works in two categories, so that brand and category go together as they do in shops.
        self.brand = (self.category + len(CATEGORIES) * make.integers(0, 15, items)) // 2 % len(BRANDS)
        self.price_z = make.standard_normal(items)
        self.price = np.round(
            np.exp(3 + 0.4 * make.standard_normal(len(CATEGORIES))[self.category] + self.price_z), 2
        )
        self.rating = np.round(np.clip(3.8 + 0.7 * make.standard_normal(items), 1, 5), 1)
        self.rated = make.random(items) > 0.15
        self.tag_count = make.integers(1, 5, items)
        self.tags = np.argsort(make.random((items, len(TAGS))), axis=1)[:, :4]
        self.popularity = np.exp(make.standard_normal(items))
        centre = make.standard_normal((len(CATEGORIES), _TASTE))
        self.vector = centre[self.category] + 0.4 * make.standard_normal((items, _TASTE))

        self.quality = make.standard_normal(items)
        self.city_effect = make.standard_normal(len(CITIES)) * (make.permutation(len(CITIES)) < len(CITIES) // 10)
        pair = make.standard_normal((len(SEGMENTS), _RANK)), make.standard_normal((len(CATEGORIES), _RANK))
        self.pair = np.einsum("sr,cr->sc", *pair)
        pair = make.standard_normal((len(CATEGORIES), _RANK)), make.standard_normal((len(DEVICES), _RANK))
        self.cube = np.einsum("p,cr,dr->pcd", make.permutation([0.0, 0.0, 0.5, 1.0]), *pair)
        self.price_matters = make.permutation(np.repeat([0.0, -1.0, 0.6], (5, 2, 1)))  # (segments,)
        self.brand_effect = make.standard_normal(len(BRANDS)) * (make.permutation(len(BRANDS)) < len(BRANDS) // 2)
        self.brand_matters = make.permutation(len(CATEGORIES)) < 6
        self.tag_effect = make.standard_normal(len(TAGS)) * (make.permutation(len(TAGS)) < len(TAGS) // 2)
        matters = np.arange(len(DEVICES) * len(CHANNELS)) < 6
        self.tags_matter = make.permutation(matters).reshape(len(DEVICES), len(CHANNELS))
        self.rating_matters = make.permutation(np.arange(len(AGES)) < 2)
        shown = np.arange(4) < self.tag_count[:, None]  # (items, 4)
        self.tag_sum = (self.tag_effect[self.tags] * shown).sum(1)

        self._activity = np.cumsum(self.activity / self.activity.sum())
        self._popularity = np.cumsum(self.popularity / self.popularity.sum())
        self._calibrate()

    def day(self, day: int) -> pl.DataFrame:
        """Return the rows of one day in order of time; day 0 is 2026-01-01. No other day is needed for it."""
        rows, days = self.options.rows, self.options.days
        count = rows * (day + 1) // days - rows * day // days
        make = self._generator(2, day)
        drawn = self._impressions(make, count, day)
        terms = self._terms(drawn)
        probability = self.click.probability(terms)
        click = make.random(count) < probability
        frame = self._frame(drawn, click, probability)
        return frame if self.conversions is None else frame.hstack(self.conversions.draw(make, drawn, terms, click))

    def useless_values(self) -> dict[str, list[str]]:
        """Return, by column, the values that change no probability: what a feature selection should find."""
        return {
            "city": [n for n, e in zip(CITIES, self.city_effect, strict=True) if e == 0],
            "brand": [n for n, e in zip(BRANDS, self.brand_effect, strict=True) if e == 0],
            "tags": [n for n, e in zip(TAGS, self.tag_effect, strict=True) if e == 0],
            "campaign": list(CAMPAIGNS),
        }

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.options.seed, *stream])))

    def _impressions(self, make: np.random.Generator, count: int, day: int) -> dict[str, np.ndarray]:
        """Who was shown what, when and where: arrays of ``count`` rows."""
        requests = -(-count // _SLATE)
        user = np.minimum(np.searchsorted(self._activity, make.random(requests)), self.options.users - 1)
        curve = 1.2 + np.sin((np.arange(24) - 14) * np.pi / 12)  # evenings are busy
        hour = _draw(make, curve, requests)
        second = np.sort(hour * 3600 + make.integers(0, 3600, requests))
        own = make.random(requests) < 0.7
        device = np.where(own, self.device[user], make.integers(0, len(DEVICES), requests))
        channel = make.integers(0, len(CHANNELS), requests)
        request = np.arange(count) // _SLATE
        item = np.minimum(np.searchsorted(self._popularity, make.random(count)), self.options.items - 1)
        return {
            "user": user[request],
            "item": item,
            "second": second[request],
            "day": np.full(count, day),
            "device": device[request],
            "channel": channel[request],
            "position": np.arange(count) % _SLATE,
            "campaign": make.integers(0, len(CAMPAIGNS), count),
        }

    def _terms(self, at: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The terms of the logit, unscaled, each (rows,)."""
        user, item, device = at["user"], at["item"], at["device"]
        segment, category = self.segment[user], self.category[item]
        angle = self.turn[user] * (at["day"] + at["second"] / 86400) + self.phase[user]
        taste = self.taste[user, 0] * np.cos(angle)[:, None] + self.taste[user, 1] * np.sin(angle)[:, None]
        daypart = at["second"] // 21600
        return {
            "quality": self.quality[item],
            "position": -np.log2(at["position"] + 1),
            "city": self.city_effect[self.city[user]],
            "segment x category": self.pair[segment, category],
            "daypart x category x device": self.cube[daypart, category, device],
            "taste": (taste * self.vector[item]).sum(1),
            "price | segment": self.price_matters[segment] * self.price_z[item],
            "brand | category": self.brand_matters[category] * self.brand_effect[self.brand[item]],
            "tags | device, channel": self.tags_matter[device, at["channel"]] * self.tag_sum[item],
            "rating | age": self.rating_matters[self.age[user]] * self.rated[item] * (self.rating[item] - 3.8),
        }

    def _calibrate(self) -> None:
        """Fit scales and intercepts to rows drawn for that."""
        make, options = self._generator(1), self.options
        drawn = [self._impressions(make, 5_000, day) for day in range(0, 40, 4)]
        at = {name: np.concatenate([d[name] for d in drawn]) for name in drawn[0]}
        terms = self._terms(at)
        self.click = Logit(WEIGHTS, terms, strength=options.strength, rate=options.click_rate)
        self.conversions: Conversions | None = None
        if options.conversion_rate is not None:
            # Drawn from a stream of its own: clicks are the same with conversions and without.
            self.conversions = Conversions(
                self,
                self._generator(3),
                (len(AGES), len(CATEGORIES)),
                at,
                terms,
                self.click.probability(terms),
                options.conversion_rate,
            )

    def _frame(self, at: dict[str, np.ndarray], click: np.ndarray, probability: np.ndarray) -> pl.DataFrame:
        user, item = at["user"], at["item"]
        midnight = np.datetime64(datetime.combine(FIRST_DAY, datetime.min.time()), "ms")
        moment = midnight + (at["day"] * 86_400_000 + at["second"] * 1000).astype("timedelta64[ms]")
        tags = pl.Series([[TAGS[t] for t in row[:n]] for row, n in zip(self.tags, self.tag_count, strict=True)])
        price = pl.Series(self.price)
        rating = pl.Series(np.where(self.rated, self.rating, np.nan)).fill_nan(None)
        return pl.DataFrame(
            {
                "click": click.astype(np.int8),
                "time": moment,
                "user_id": user.astype(np.int32),
                "segment": _names(SEGMENTS, self.segment[user]),
                "age": _names(AGES, self.age[user]),
                "city": _names(CITIES, self.city[user]),
                "item_id": item.astype(np.int32),
                "category": _names(CATEGORIES, self.category[item]),
                "brand": _names(BRANDS, self.brand[item]),
                "price": price[item],
                "rating": rating[item],
                "tags": tags[item],
                "device": _names(DEVICES, at["device"]),
                "channel": _names(CHANNELS, at["channel"]),
                "hour": (at["second"] // 3600).astype(np.int8),
                "position": (at["position"] + 1).astype(np.int8),
                "campaign": _names(CAMPAIGNS, at["campaign"]),
                TRUTH: probability,
            }
        )


SPEC = FeatureSpec(
    label="click",
    user="user_id",
    item="item_id",
    timestamp="time",
    dim=8,
    columns=(
        Column(name="user_id", kind="categorical", role="user", encode=Vocabulary(min_count=2)),
        Column(name="segment", kind="categorical", role="user"),
        Column(name="age", kind="categorical", role="user"),
        Column(name="city", kind="categorical", role="user"),
        Column(name="item_id", kind="categorical", role="item", encode=Vocabulary(min_count=2)),
        Column(name="category", kind="categorical", role="item"),
        Column(name="brand", kind="categorical", role="item"),
        Column(name="price", kind="numeric", role="item", encode=Standard(log=True)),
        Column(name="rating", kind="numeric", role="item", encode=Quantile(buckets=10)),
        Column(name="tags", kind="multi", role="item", max_length=4),
        Column(name="device", kind="categorical"),
        Column(name="channel", kind="categorical"),
        Column(name="hour", kind="categorical"),
        Column(name="position", kind="categorical"),
        Column(name="campaign", kind="categorical"),
        clicked_before("item_id", 20),
    ),
    keep=(TRUTH,),
)


@register_dataset("click_world")
class ClickWorld(Dataset):
    """The built-in source: makes its log when it is first opened, one Parquet file a day.

    Without a path the files lie under ``runs/click_world``, in a folder named after the options. With one
    they lie there; a world that is there already is read as it is, with as many days as it has.
    """

    Options = ClickWorldOptions
    options: ClickWorldOptions

    def open(self, path: Path | None) -> RawData:
        """Write the world if it is not there, and open its days up to ``until``.

        Raises:
            DataError: the folder holds something else, a world of other options, or no day up to ``until``.
        """
        folder = path if path is not None else world_folder(self.options)
        if not (folder / _CARD).is_file():  # all of it: who asks for a later day next must not get fewer
            write_world(self.options.model_copy(update={"until_day": None, "until": None}), folder)
        options = _check_card(self.options, folder)
        files = [f for f in map(lambda d: day_file(folder, d), range(options.last_day)) if f.is_file()]
        if not files:
            raise DataError(
                "the world has no day yet that is asked for",
                where=str(folder),
                remedy=f"ask for {FIRST_DAY} or a later day, or write it: sluice data world --day",
            )
        converts = options.conversion_rate is not None
        return RawData(
            {"all": RawPart(scan_parquet(files), folder)},
            SplitConfig(by="time"),
            SPEC.model_copy(update={"tasks": (CONVERSION,)}) if converts else SPEC,
            fingerprint(self.name, options, files),
            truth=TRUTH,
            task_truth={CONVERSION: CONVERSION_TRUTH} if converts else {},
        )


def world_folder(options: ClickWorldOptions) -> Path:
    """Return the folder of a world that is given no path."""
    text = json.dumps(options.world(), sort_keys=True)
    return Path("runs") / "click_world" / hashlib.sha256(text.encode()).hexdigest()[:16]


def day_file(folder: Path, day: int) -> Path:
    """Return the file of a day; day 0 is 2026-01-01."""
    return folder / f"clicks-{FIRST_DAY + timedelta(days=day)}.parquet"


def write_world(
    options: ClickWorldOptions, folder: Path, *, on_day: Callable[[int], None] | None = None
) -> list[Path]:
    """Write a world, one file a day up to ``until``: all of it or nothing.

    Args:
        options: which world.
        folder: absent, empty, or with a world of the same options, which is written again.
        on_day: called with the number of rows after each day.

    Returns:
        The files, in order.
    """
    _check_folder(options, folder)
    world = World(options)
    with atomic_directory(folder) as aside:
        for day in range(options.last_day):
            frame = world.day(day)
            day_file(aside, day).write_bytes(_parquet(frame))
            if on_day is not None:
                on_day(len(frame))
        (aside / _CARD).write_text(_card(options), encoding="utf-8")
    return [day_file(folder, day) for day in range(options.last_day)]


def write_day(options: ClickWorldOptions, folder: Path, day: int) -> Path:
    """Add one day to a world, as a log grows; writing it again gives the same bytes.

    Args:
        options: which world.
        folder: absent, empty, or with other days of the same world.
        day: 0 is 2026-01-01.

    Raises:
        DataError: the world has no such day, or the folder holds something else.
    """
    if not 0 <= day < options.days:
        last = FIRST_DAY + timedelta(days=options.days - 1)
        raise DataError(
            f"the world has no {FIRST_DAY + timedelta(days=day)}",
            where="click_world",
            remedy=f"give a day from {FIRST_DAY} to {last}, or more days",
        )
    _check_folder(options, folder)
    path = day_file(folder, day)
    atomic_write(path, _parquet(World(options).day(day)))
    atomic_write(folder / _CARD, _card(options))
    return path


def best_possible(frame: pl.DataFrame) -> dict[str, float]:
    """Return AUC and logloss of the true probabilities: no model can expect better on these rows.

    Args:
        frame: rows with ``click`` and ``true_probability``.

    Returns:
        ``auc`` and ``logloss``.
    """
    from pipelines.evaluation.metrics import auc, logloss

    label, truth = frame["click"].to_numpy(), frame[TRUTH].to_numpy()
    return {"auc": float(auc(label, truth)), "logloss": float(logloss(label, truth))}


def _draw(make: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    """Draw ``count`` places of ``weights``, each as often as its weight says."""
    ends = np.cumsum(weights)
    return np.minimum(np.searchsorted(ends, make.random(count) * ends[-1]), len(weights) - 1)


def _names(names: tuple[str, ...], index: np.ndarray) -> pl.Series:
    return pl.Series(names)[index]


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="lz4", row_group_size=65_536)
    return buffer.getvalue()


def _card(options: ClickWorldOptions) -> str:
    return json.dumps(options.world(), indent=1, sort_keys=True) + "\n"


def _check_folder(options: ClickWorldOptions, folder: Path) -> None:
    if (folder / _CARD).is_file():
        _check_card(options, folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"there is something, and no {_CARD}: it is no click world",
            where=str(folder),
            remedy="give an empty folder, or read these files by source: parquet",
        )


def _check_card(options: ClickWorldOptions, folder: Path) -> ClickWorldOptions:
    """Compare what the config sets with the world that is there; return the options of that world."""
    card = folder / _CARD
    try:
        known = json.loads(card.read_text(encoding="utf-8"))
        version = known.pop("version")
        ends = {"until_day": options.until_day, "until": options.until}
        there = ClickWorldOptions(**known, **ends)
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError):
        raise DataError("is damaged", where=str(card), remedy="delete the folder; it is made again") from None
    if version != _VERSION:
        raise DataError(
            f"was made by version {version} of the world, this is {_VERSION}",
            where=str(card),
            remedy="delete the folder; it is made again",
        )
    for name in sorted(options.model_fields_set):
        asked, found = getattr(options, name), getattr(there, name)
        if asked != found:
            raise DataError(
                f"the world there has {name} {found}, the config asks for {asked}",
                where=str(card),
                remedy="give another path, or no path",
            )
    return there
