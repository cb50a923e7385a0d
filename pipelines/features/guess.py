"""A look at a log: which column is the label, the user, the item, the time, and how to encode the others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ctr_models.errors import DataError, nearest
from ctr_models.schema import Role
from pipelines.datasets.base import DATASETS
from pipelines.datasets.csv import SUFFIXES as CSV
from pipelines.datasets.csv import sniff_separator
from pipelines.datasets.files import expand
from pipelines.datasets.parquet import SUFFIXES as PARQUET
from pipelines.features.clues import (
    SAMPLE,
    empty_values,
    id_encoding,
    is_binary,
    is_epoch,
    mean,
    number_encoding,
    several_values,
    value_range,
)
from pipelines.features.spec import (
    Column,
    FeatureSpec,
    FromLog,
)
from pipelines.features.validate import reading

_LABELS = (
    "click",
    "clicked",
    "is_click",
    "is_clicked",
    "label",
    "target",
    "y",
    "converted",
    "conversion",
    "purchase",
)
_USERS = ("user_id", "userid", "user", "uid", "member_id", "customer_id", "visitor_id", "account_id", "client_id")
_ITEMS = (
    *(
        "item_id",
        "itemid",
        "item",
        "iid",
        "ad_id",
        "creative_id",
        "product_id",
        "movie_id",
        "video_id",
        "article_id",
    ),
    *("news_id", "app_id", "sku", "song_id", "track_id", "doc_id", "post_id", "listing_id", "hotel_id", "book_id"),
)
_TIMES = ("timestamp", "time", "ts", "datetime", "event_time", "created_at", "date", "day", "unix_time")
_HISTORY = re.compile(r"hist|sequence|(^|_)seq|recent|previous|behaviou?r|(^|_)last_|clicked_|viewed_")
_SCORES = re.compile(r"true_prob|propensity|pctr|predict")
_CODES = re.compile(
    r"(^|_)(id|ids|code|type|category|cat|class|zip|zip_?code|postcode|brand|hash|group|status|no)$"
)


@dataclass(frozen=True)
class Guess:
    """One column of the log.

    Args:
        name: as the file has it.
        use: label, user, item, timestamp, feature, keep, or left out.
        why: what was seen and what was made of it.
        column: its definition, if it is a feature.
        distinct: different values in the sample.
        missing: share of empty values in the sample.
    """

    name: str
    use: str
    why: str
    column: Column | None
    distinct: int
    missing: float


@dataclass(frozen=True)
class Source:
    """Where the log lies and what reads it.

    Args:
        path: what was looked at.
        name: the data source.
        options: the source's options.
        rows: rows altogether, where the file tells without being read.
        given: the folder has train, valid and test files.
    """

    path: Path
    name: str
    options: dict[str, Any]
    rows: int | None
    given: bool


@dataclass(frozen=True)
class Proposal:
    """What a look at a file suggests.

    Args:
        source: where the log lies and what reads it.
        sample: rows that were looked at, the first ones.
        guesses: one for each column, and one for a history made from the log.
        spec: the definition they make.
        remarks: by role (label, user, item, timestamp): why that column, or why none.
    """

    source: Source
    sample: int
    guesses: tuple[Guess, ...]
    spec: FeatureSpec
    remarks: dict[str, str]


def guess(
    path: Path,
    *,
    label: str | None = None,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    sample: int = SAMPLE,
) -> Proposal:
    """Look at the first rows of a Parquet or CSV log and propose a FeatureSpec.

    Args:
        path: a file, a folder of files, or a pattern.
        label, user, item, time: columns that need no guessing.
        sample: rows to look at.

    Raises:
        DataError: nothing is there, a named column is absent, or no column could be the label.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "clicks.parquet"
        >>> pl.DataFrame({"click": [0, 1] * 50, "user_id": list(range(50)) * 2}).write_parquet(path)
        >>> proposal = guess(path)
        >>> proposal.spec.label, proposal.spec.user, [c.name for c in proposal.spec.columns]
        ('click', 'user_id', ['user_id'])
    """
    source, frame = _open(path, sample)
    for named in (label, user, item, time):
        if named is not None and named not in frame.columns:
            raise DataError(f"no column {named!r}", where=str(path), remedy=nearest(named, frame.columns))
    look = _Look(frame, path)
    look.choose(label, user, item, time)
    guesses = look.guesses()
    spec = FeatureSpec(
        label=look.label,
        user=look.user,
        item=look.item,
        timestamp=look.time,
        columns=tuple(g.column for g in guesses if g.column is not None),
        keep=tuple(g.name for g in guesses if g.use == "keep"),
    )
    return Proposal(source, len(frame), tuple(guesses), spec, look.remarks)


def _open(path: Path, sample: int) -> tuple[Source, pl.DataFrame]:
    """Read the first rows through the source that the config will name."""
    of_parquet = path.is_dir() and any(p.suffix.lower() in PARQUET for p in path.iterdir())
    source = "parquet" if of_parquet or path.suffix.lower() in PARQUET else "csv"
    options: dict[str, Any] = {}
    if source == "csv":
        first = expand(path, CSV, what="CSV")[0]
        options["infer_rows"] = sample
        if zeros := _leading_zeros(first, sample):
            options["types"] = dict.fromkeys(zeros, "text")
    cls = DATASETS[source]
    data = cls(cls.Options(**options)).open(path)
    part = data.parts.get("all") or data.parts["train"]
    with reading(str(part.path)):
        frame = part.frame.head(sample).collect()
        rows: int | None = len(frame)
        if rows == sample:
            rows = part.frame.select(pl.len()).collect().item() if source == "parquet" else None
    if frame.is_empty():
        raise DataError("there are no rows", where=str(path), remedy="give a log with a header and rows")
    return Source(path, source, options, rows, "train" in data.parts), frame


def _leading_zeros(path: Path, sample: int) -> list[str]:
    """Columns of digits that begin with 0, such as zip codes: reading them as numbers would join 007 and 7."""
    with reading(str(path)):
        text = pl.read_csv(path, separator=sniff_separator(path), n_rows=sample, infer_schema=False, glob=False)
    return [c.name for c in text if c.str.contains(r"^0\d+$").any() and c.drop_nulls().str.contains(r"^\d+$").all()]


class _Look:
    """The sample, and what has been made of it so far."""

    def __init__(self, frame: pl.DataFrame, path: Path) -> None:
        self.frame, self.path = frame, path
        self.lower = {re.sub(r"[^a-z0-9]+", "_", name.lower()): name for name in reversed(frame.columns)}
        self.remarks: dict[str, str] = {}
        self.taken: set[str] = set()
        self.item_column: Column | None = None

    def choose(self, label: str | None, user: str | None, item: str | None, time: str | None) -> None:
        """Settle the four columns that a FeatureSpec names."""
        self.label = self._label(label)
        self.time = self._time(time)
        self.user = self._named("user", user, _USERS, "per-user metrics and histories need one")
        self.item = self._named("item", item, _ITEMS, "histories need one")

    def guesses(self) -> list[Guess]:
        """Look at every column, then add a history if the log can make one."""
        self.roles = _Roles(self.frame, self.user, self.item)
        self.label_values = self.frame[self.label].cast(pl.Float64, strict=False).fill_null(0).to_numpy()
        # The item first: a history may share its table.
        first = [self.frame[self.item]] if self.item else []
        by_name = {series.name: self._guess(series) for series in [*first, *self.frame.drop(self.item or [])]}
        found = [by_name[name] for name in self.frame.columns]
        has_sequence = any(g.column is not None and g.column.kind == "sequence" for g in found)
        if self.user and self.time and not has_sequence:
            item = self.item_column
            if item is not None and item.kind == "categorical":
                column = Column(
                    name=self._name("history"),
                    kind="sequence",
                    table=item.name,
                    target=item.name,
                    role="user",
                    max_length=20,
                    from_log=FromLog(column=item.column),
                )
                why = (
                    f"made from the log: the last 20 {self.item} that the {self.user} clicked before the row's time"
                )
                found.append(Guess(column.name, "feature", why, column, 0, 0.0))
        if not any(g.column for g in found):
            raise DataError(
                "no column is left to learn from", where=str(self.path), remedy="give a log with features"
            )
        return found

    def _label(self, given: str | None) -> str:
        binary = [s.name for s in self.frame if is_binary(s)]
        if given is not None:
            self.remarks["label"] = "given by --label"
            return given
        named = [self.lower[n] for n in _LABELS if self.lower.get(n) in binary]
        if named or len(binary) == 1:
            label = (named or binary)[0]
            rate = float(self.frame[label].cast(pl.Float64).to_numpy().mean())
            self.remarks["label"] = f"holds only 0 and 1; {rate:.1%} of the rows are 1"
            return label
        if self.frame.width == 1:
            raise DataError(
                f"its only column is {self.frame.columns[0]!r}, and does not hold 0 and 1",
                where=str(self.path),
                remedy="if that is several, put commas, tabs, semicolons or bars between them",
            )
        which = f"columns {', '.join(binary)} do, and none is named like a label" if binary else "none does"
        raise DataError(
            f"one column must hold only 0 and 1 to be the label; {which}",
            where=str(self.path),
            remedy="name the column with --label; a rating or a count must first be turned into 0 and 1",
        )

    def _time(self, given: str | None) -> str | None:
        temporal = [s.name for s in self.frame if s.dtype in (pl.Datetime, pl.Date) and s.null_count() < len(s)]
        named = [self.lower[n] for n in _TIMES if n in self.lower]
        epochs = [n for n in named if is_epoch(self.frame[n])]
        found = given or next(iter([n for n in named if n in temporal] + epochs + temporal), None)
        if found is None:
            self.remarks["timestamp"] = "no column of dates or times was found: no split by time, no history"
            return None
        series = self.frame[found]
        order = "in order" if series.drop_nulls().is_sorted() else "not in order"
        self.remarks["timestamp"] = f"from {series.min()!s} to {series.max()!s} in the sample, rows {order}"
        return found

    def _named(self, what: str, given: str | None, names: tuple[str, ...], use: str) -> str | None:
        found = given or next((self.lower[n] for n in names if n in self.lower), None)
        if found is None:
            self.remarks[what] = f"no column is named like {'an' if what == 'item' else 'a'} {what}; {use}"
        else:
            rows = len(self.frame) / max(1, self.frame[found].n_unique())
            how = f"given by --{what}" if given else "by its name"
            self.remarks[what] = f"{how}; {rows:,.1f} rows for each in the sample"
        return found

    def _name(self, raw: str) -> str:
        """A name that the FeatureSpec accepts and no other column has."""
        name = re.sub(r"[^A-Za-z0-9_]", "_", raw)[:90]
        name = name if re.match(r"[A-Za-z_]", name) else f"c_{name}"
        count = 2
        unique = name
        while unique in self.taken:
            unique, count = f"{name}_{count}", count + 1
        self.taken.add(unique)
        return unique

    def _guess(self, series: pl.Series) -> Guess:
        empty = empty_values(series)
        missing = empty / len(series)
        distinct = series.drop_nulls().n_unique() if not isinstance(series.dtype, pl.Struct) else 0
        role = {self.label: "label", self.time: "timestamp"}.get(series.name)
        if role is not None:
            return Guess(series.name, role, self.remarks[role], None, distinct, missing)
        why = self._reason_to_leave(series, distinct, missing)
        if why is not None:
            keep = why.startswith("kept")
            return Guess(series.name, "keep" if keep else "left out", why, None, distinct, missing)
        column, why = self._feature(series, distinct)
        if missing > 0:
            why += f"; {missing:.1%} missing" if missing >= 0.001 else "; a few missing"
        use = {self.user: "user", self.item: "item"}.get(series.name, "feature")
        if use == "item":
            self.item_column = column
        return Guess(series.name, use, why, column, distinct, missing)

    def _reason_to_leave(self, series: pl.Series, distinct: int, missing: float) -> str | None:
        name, kind = series.name, series.dtype
        if missing == 1:
            return "every value is missing"
        if isinstance(kind, pl.List | pl.Array):
            return None
        if kind.is_nested() or kind == pl.Binary or kind == pl.Object:
            return f"values of type {kind} can't be encoded"
        if kind == pl.String and name.lower() in _TIMES and name != self.time:
            return "times written as text; write them as datetimes to split by time"
        if kind.is_temporal():
            return "a second date or time; derive an hour, a weekday or an age from it to use it"
        if distinct == 1:
            return f"always {str(series.drop_nulls()[0])[:60]!r}"
        if name in (self.user, self.item):
            return None
        if _SCORES.search(name.lower()):
            return "kept beside the features, not learnt from: by its name a model's output or the truth"
        if distinct > 0.95 * (1 - missing) * len(series) and len(series) > 100 and not kind.is_float():
            return f"{distinct:,} distinct values in {len(series):,} rows: nothing to learn from a value seen once"
        if kind == pl.String and distinct > 1000 and mean(series.str.len_chars()) > 40:
            return "looks like free text"
        if (area := self._tells_label(series, distinct)) > 0.995:
            return f"tells the label almost alone (AUC {area:.3f}): is it known before the click?"
        return None

    def _tells_label(self, series: pl.Series, distinct: int) -> float:
        """AUC of the best ordering of a column's values, or of its numbers; 0.5 where it can't be told."""
        from pipelines.evaluation.metrics import auc

        positives = self.label_values.sum()
        if min(positives, len(series) - positives) < 20:
            return 0.5
        if distinct <= len(series) / 50:
            frame = pl.DataFrame({"x": series, "y": self.label_values})
            score = frame.select(pl.col("y").mean().over("x"))["y"].to_numpy()
        elif series.dtype.is_numeric():
            score = series.cast(pl.Float64).fill_nan(None).fill_null(-1e300).to_numpy()
        else:
            return 0.5
        area = float(auc(self.label_values, score))
        return max(area, 1 - area)

    def _feature(self, series: pl.Series, distinct: int) -> tuple[Column, str]:
        name, rows = self._name(series.name), len(series)
        role, because = self.roles.of(series)
        common: dict[str, Any] = {"name": name, "role": role}
        if name != series.name:
            common["source"] = series.name
        parts = several_values(series)
        if parts is not None:
            separator, elements = parts
            return self._several(
                series, elements, common | ({"separator": separator} if separator else {}), because
            )
        count = f"{distinct:,} distinct values in {rows:,} rows"
        code = _CODES.search(series.name.lower()) is not None
        # Users and items are never numbers, even where gaps made a tool write them as floats.
        if series.name not in (self.user, self.item) and (
            series.dtype.is_float()
            or series.dtype.is_decimal()
            or (series.dtype.is_integer() and not code and distinct > 50)
        ):
            encode, how = number_encoding(series)
            return Column(
                kind="numeric", encode=encode, **common
            ), f"{count}, {value_range(series)}: {how}{because}"
        ids, how = id_encoding(distinct, rows)
        return Column(kind="categorical", encode=ids, **common), f"{count}{how}{because}"

    def _several(
        self, series: pl.Series, elements: pl.Series, common: dict[str, Any], because: str
    ) -> tuple[Column, str]:
        """A column with several values a row: a history if its name says so, else a set."""
        lengths = elements.list.len().drop_nulls()
        longest = max(1, int(lengths.to_numpy().max(initial=0)))
        inner = elements.explode().drop_nulls()
        distinct = inner.n_unique()
        what = f"{mean(lengths):.1f} values a row, at most {longest}; {distinct:,} distinct"
        if not _HISTORY.search(series.name.lower()):
            encode, how = id_encoding(distinct, len(inner))
            return (
                Column(kind="multi", encode=encode, max_length=min(longest, 50), **common),
                f"{what}{how}{because}",
            )
        common["role"] = "user"
        item = self.item_column
        if item is not None and item.kind == "categorical":
            known = self.frame[item.column].cast(pl.String).unique()
            if mean(inner.cast(pl.String).is_in(known.implode())) > 0.5:
                return (
                    Column(
                        kind="sequence", table=item.name, target=item.name, max_length=min(longest, 50), **common
                    ),
                    f"{what}: a history of {item.column} by its name and values, which share one table",
                )
        encode, how = id_encoding(distinct, len(inner))
        return (
            Column(kind="sequence", encode=encode, max_length=min(longest, 50), **common),
            f"{what}{how}: a history by its name",
        )


class _Roles:
    """Whether a column describes the user, the item or the moment."""

    def __init__(self, frame: pl.DataFrame, user: str | None, item: str | None) -> None:
        self.owners: dict[Role, str | None] = {"user": user, "item": item}
        plain = [s.name for s in frame if s.name not in (user, item) and s.dtype not in (pl.Struct, pl.Object)]
        self.constant: dict[Role, set[str]] = {"user": set(), "item": set()}
        for role, owner in self.owners.items():
            if owner is None or not plain:
                continue
            groups = frame.group_by(owner).agg(pl.len().alias("__rows__"), pl.col(plain).n_unique())
            groups = groups.filter(pl.col("__rows__") > 1)
            if len(groups) >= 10:
                share = groups.select((pl.col(plain) == 1).mean()).row(0, named=True)
                self.constant[role] = {n for n, s in share.items() if s >= 0.99}

    def of(self, series: pl.Series) -> tuple[Role, str]:
        """Return the role and the words that explain it."""
        for role, owner in self.owners.items():
            if series.name == owner:
                return role, ""
            if series.name in self.constant[role]:
                return role, f"; the same in all rows of one {owner}, so it describes the {role}"
            if series.name.lower().startswith(f"{role}_"):
                return role, f"; describes the {role} by its name"
        return "context", ""
