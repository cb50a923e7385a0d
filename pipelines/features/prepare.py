"""From raw logs to encoded Parquet: check, split, fit on the training rows, encode all, remember by content."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from ctr_models.batch import Ragged
from ctr_models.errors import ArtifactError, ConfigError
from ctr_models.schema import Schema
from pipelines.datasets.base import RawData
from pipelines.datasets.config import SplitConfig
from pipelines.features.columns import Coded, RawColumn
from pipelines.features.crosses import Crosser
from pipelines.features.encoders import MISSING, UNKNOWN
from pipelines.features.files import atomic_directory, sha256_file
from pipelines.features.fit import CHUNK, Fitter
from pipelines.features.progress import steps
from pipelines.features.sequences import Histories, log_histories
from pipelines.features.spec import Column, FeatureSpec
from pipelines.features.split import SPLITS, assign, check_split
from pipelines.features.stage import WORKERS, Source, Staged, open_writer, ordered, stage
from pipelines.features.state import FeatureState
from pipelines.features.transform import ROW, USER, Encoded, Encoder, arrow_lists, take
from pipelines.features.validate import naming

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class EncodedData:
    """Encoded features on disk: one folder, named by what went into it.

    Args:
        path: the folder.
        state: the fitted features.
        schema: the model's side of them.
        manifest: rows and files of every split, and where they come from.
        truth: the kept column that holds the true click probability, where it is known.
    """

    path: Path
    state: FeatureState
    schema: Schema
    manifest: dict[str, Any]
    truth: str | None

    @property
    def task_truth(self) -> dict[str, str]:
        """The kept column of the true probability by further task, where it is known."""
        return self.manifest.get("task_truth", {})

    def files(self, split: str) -> list[Path]:
        """Return the Parquet files of ``train``, ``valid`` or ``test``."""
        return [self.path / entry["file"] for entry in self.manifest["splits"][split]["files"]]

    def rows(self, split: str) -> int:
        """Return the number of rows of a split."""
        return int(self.manifest["splits"][split]["rows"])

    def frame(self, split: str) -> pl.LazyFrame:
        """Return a split's encoded columns."""
        return pl.scan_parquet(self.files(split), glob=False)

    @classmethod
    def open(cls, path: Path) -> EncodedData:
        """Open a folder that :func:`prepare` wrote.

        Raises:
            ArtifactError: a file is missing, of another size, or the state is damaged.
        """
        path = Path(path)
        file = path / MANIFEST
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            entries = [entry for split in SPLITS for entry in manifest["splits"][split]["files"]]
            parts = [(path / entry["file"], entry["bytes"]) for entry in entries]
            found, state_hash, truth = manifest["format"], manifest["state"], manifest["truth"]
        except FileNotFoundError:
            raise ArtifactError(
                "no encoded features", where=str(file), remedy="sluice features makes them"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"not a manifest of encoded features ({error})", where=str(file), remedy=_again(path)
            ) from None
        if found != FORMAT:
            raise ArtifactError(
                f"format {found!r}, this version of sluice reads {FORMAT}", where=str(file), remedy=_again(path)
            )
        for part, written in parts:
            size = part.stat().st_size if part.is_file() else None
            if size != written:
                problem = "the file is missing" if size is None else f"{size} bytes, {written} were written"
                raise ArtifactError(problem, where=str(part), remedy=_again(path))
        state = FeatureState.load(path / "state")
        if state.hash != state_hash:
            raise ArtifactError("the state is another's", where=str(path / "state"), remedy=_again(path))
        return cls(path, state, state.schema(), manifest, truth)


def _again(path: Path) -> str:
    return f"remove {path} and run sluice features again"


def prepare(
    data: RawData,
    spec: FeatureSpec | None,
    *,
    workdir: Path,
    seed: int,
    progress: bool = True,
) -> EncodedData:
    """Check, split, fit and encode a log; an earlier result of the same content is opened instead.

    The same data, spec, split and seed give the same bytes.

    Args:
        data: an opened source.
        spec: the definition; None takes the source's own.
        workdir: the result lies in ``features/<hash>`` below it.
        seed: of a random split.
        progress: show what is being done.

    Returns:
        The encoded features.

    Raises:
        ConfigError: there is no spec, or it does not go with the split.
        DataError: the log is not what the spec says: file, column, row and remedy are named.
    """
    spec = spec if spec is not None else data.spec
    if spec is None:
        raise ConfigError(
            "the source has no features of its own", where="features", remedy="sluice init proposes some"
        )
    check_split(data.split, list(data.parts), spec)
    task_truth = {task: column for task, column in data.task_truth.items() if task in spec.tasks}
    kept = _kept(spec, [*([data.truth] if data.truth else []), *task_truth.values()])
    key = _key(data, spec, seed)
    folder = Path(workdir) / "features"
    final = folder / key
    if (final / MANIFEST).is_file():
        return EncodedData.open(final)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    sources = sources_of(data)
    column = [data.split.column] if data.split.by == "column" and data.split.column else []
    with tempfile.TemporaryDirectory(prefix=".stage.", dir=folder) as scratch, steps(progress) as step:
        staged = stage(
            sources,
            spec,
            Path(scratch),
            keep=[n for n in dict.fromkeys((*kept, *column)) if n not in spec.keep],
            timed=spec.timestamp is not None,
            on_rows=step("reading", None),
        )
        split = assign(staged, data.split, seed, sources)
        state = _fit(staged, spec, split, str(sources[0].path), step("fitting", staged.rows))
        with atomic_directory(final) as aside, ThreadPoolExecutor(WORKERS) as pool:
            saved = pool.submit(state.save, aside / "state")
            _encode(staged, state, split, kept, aside, str(sources[0].path), step("encoding", staged.rows))
            saved.result()
            rows = [int((split == i).sum()) for i in range(len(SPLITS))]
            manifest = {
                "format": FORMAT,
                "key": key,
                "fingerprint": data.fingerprint,
                "split": data.split.model_dump(mode="json"),
                "seed": seed,
                "truth": data.truth,
                **({"task_truth": task_truth} if task_truth else {}),
                "state": state.hash,
                "schema": state.schema().model_dump(mode="json"),
                "splits": dict(zip(SPLITS, pool.map(partial(split_entry, aside), SPLITS, rows), strict=True)),
            }
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return EncodedData(final, state, state.schema(), manifest, data.truth)


def sources_of(data: RawData) -> list[Source]:
    """Return the parts of a log in the order in which they happened."""
    order = SPLITS if data.split.by == "given" else tuple(data.parts)
    return [Source(name, data.parts[name].frame, data.parts[name].path) for name in order]


def _sweep(folder: Path) -> None:
    """Remove what runs that were killed more than a day ago left half done."""
    for path in folder.glob(".*"):
        with suppress(OSError):
            if path.is_dir() and time.time() - path.stat().st_mtime > 86_400:
                shutil.rmtree(path)


def _kept(spec: FeatureSpec, truths: list[str]) -> list[str]:
    """The raw columns that are carried along, none of which may hide an encoded one."""
    kept = list(dict.fromkeys((*spec.keep, *truths)))
    clash = sorted({c.name for c in spec.columns} & set(kept))
    if clash:
        raise ConfigError(
            f"{clash[0]!r} is kept raw and is also the name of a feature",
            where="features.keep",
            remedy="give the feature another name, and the raw column as its source",
        )
    return kept


def _key(data: RawData, spec: FeatureSpec, seed: int) -> str:
    """The name of the result: a hash of all that decides its bytes."""
    split: SplitConfig = data.split
    content = [FORMAT, data.fingerprint, spec.model_dump(mode="json"), split.model_dump(mode="json"), seed]
    return hashlib.sha256(json.dumps([*content, data.truth], sort_keys=True).encode()).hexdigest()[:32]


def _fit(
    staged: Staged, spec: FeatureSpec, split: np.ndarray, source: str, on_rows: Callable[[int], None]
) -> FeatureState:
    fitter = Fitter(spec, staged.types, source)
    for rows, chunk in staged.chunks(fitter.columns):
        train = split[rows] == 0
        if train.any():
            fitter.add(chunk, len(train), train)
        on_rows(len(train))
    return fitter.state().assign()


class _Features:
    """Encodes chunks of a staged log; a text column's dictionary is encoded once."""

    def __init__(self, staged: Staged, state: FeatureState, source: str) -> None:
        self.staged, self.spec, self.source = staged, state.spec, source
        self.encoder = Encoder(state)
        self.columns = {c.name: c for c in self.spec.columns}
        self.names = [f.name for f in state.schema().fields]
        self.crosser = Crosser(self.spec, state.types, source)
        self.of_dictionary: dict[str, Encoded] = {}
        for c in self.spec.direct:
            if c.from_log is None and c.column in staged.dictionaries:
                with naming(source, c.column):
                    self.of_dictionary[c.name] = self._dictionary(c)
        if self.spec.user in staged.dictionaries:
            self.of_dictionary[USER] = self.encoder.users(_with_null(staged.dictionaries[self.spec.user]))
        self.histories = {c.name: self._history(c) for c in self.spec.columns if c.from_log is not None}

    def _dictionary(self, column: Column) -> Encoded:
        """Encode the distinct texts of a column, and null at the end."""
        texts = self.staged.dictionaries[column.column]
        table = self.encoder.state.tables.get(column.table or column.name)
        if (
            column.kind != "categorical"
            or table is None
            or table.type != "text"
            or table.encoding.how != "vocabulary"
        ):
            return self.encoder.column(column, _with_null(texts))
        # The stage can find texts in its dictionary; so the few known values are looked up, not the many seen.
        values, ids = table.known()
        out = np.full(len(texts) + 1, UNKNOWN, dtype=np.int32)
        places = self.staged.places(column.column, values)
        out[places[places >= 0]] = ids[places >= 0]
        out[self.staged.places(column.column, pl.Series([""]))] = MISSING
        out[-1] = MISSING
        return out

    @property
    def raw(self) -> list[str]:
        """The staged columns that are read."""
        names = [c.column for c in self.spec.direct if c.from_log is None]
        return list(dict.fromkeys([*names, *self.spec.labels, *([self.spec.user] if self.spec.user else [])]))

    def encode(self, chunk: dict[str, RawColumn], rows: slice) -> dict[str, Encoded]:
        """Encode the rows of a chunk, in the order of the schema."""
        out: dict[str, Encoded] = {}
        crossed = {name: self.encoder.ids(name, keys) for name, keys in self.crosser.keys(chunk)}
        for name in self.names:
            if name in crossed:
                out[name] = crossed[name]
            elif name in self.histories:
                histories, ids = self.histories[name]
                out[name] = histories.take(ids, rows)
            else:
                c = self.columns[name]
                with naming(self.source, c.column):
                    out[name] = self._column(name, chunk[c.column], partial(self.encoder.column, c))
        for name in self.spec.labels:
            label = chunk[name]
            assert isinstance(label, pl.Series)
            out[name] = label.to_numpy()
        if self.spec.user is None:
            out[USER] = np.zeros(rows.stop - rows.start, dtype=np.int64)
        else:
            out[USER] = self._column(USER, chunk[self.spec.user], self.encoder.users)
        out[ROW] = np.arange(rows.start, rows.stop, dtype=np.int64)
        return out

    def _column(self, name: str, raw: RawColumn, encode: Callable[[pl.Series], Encoded]) -> Encoded:
        if not isinstance(raw, Coded):
            return encode(raw)
        # The last entry is null's; a code of -1 addresses it, in an array even as it stands.
        values, index = self.of_dictionary[name], raw.index
        if isinstance(values, Ragged):
            index = np.where(index < 0, len(raw.values), index)
        return take(values, index)

    def _history(self, column: Column) -> tuple[Histories, np.ndarray]:
        """Find every row's history; ids of its events, (E,) int32."""
        assert self.spec.user is not None
        table = column.table or column.name
        user = self.staged.whole(self.spec.user)
        users = self.of_dictionary[USER][user.index] if isinstance(user, Coded) else self.encoder.users(user)  # type: ignore[index]
        raw = self.staged.whole(column.column)
        with naming(self.source, column.column):
            if isinstance(raw, Coded):
                ids = self.encoder.ids(table, _with_null(raw.values))[raw.index]
            else:
                ids = self.encoder.ids(table, raw)
        histories = log_histories(self.staged, column, users, ids != MISSING)
        return histories, ids[histories.events]


def _with_null(values: pl.Series) -> pl.Series:
    return pl.concat([values, pl.Series(values.name, [None], dtype=values.dtype)])


def _encode(
    staged: Staged,
    state: FeatureState,
    split: np.ndarray,
    kept: list[str],
    folder: Path,
    source: str,
    on_rows: Callable[[int], None],
) -> None:
    features = _Features(staged, state, source)
    writers = [_Writer(folder / name / "part-00000.parquet") for name in SPLITS]

    def work(rows: slice, chunk: dict[str, RawColumn]) -> list[pa.Table | None]:
        encoded = features.encode(chunk, rows)
        raw = {name: _raw(chunk[name], staged.dtypes[name]) for name in kept}
        return [_rows_of(encoded, raw, split[rows] == place) for place in range(len(SPLITS))]

    wanted = list(dict.fromkeys((*features.raw, *kept)))
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            for tables in ordered(pool, work, staged.chunks(wanted), WORKERS):
                for writer, table in zip(writers, tables, strict=True):
                    if table is not None:
                        writer.add(table)
                        on_rows(table.num_rows)
    finally:
        for writer in writers:
            writer.close()


def _rows_of(encoded: dict[str, Encoded], raw: dict[str, pa.Array], mask: np.ndarray) -> pa.Table | None:
    """The chosen rows of a chunk as a table; None if there are none."""
    if not mask.any():
        return None
    chosen = np.flatnonzero(mask)
    every = len(chosen) == len(mask)
    columns = {name: values if every else take(values, chosen) for name, values in encoded.items()}
    arrays = {n: pa.array(v) if isinstance(v, np.ndarray) else arrow_lists(v) for n, v in columns.items()}
    arrays |= {name: values if every else values.take(pa.array(chosen)) for name, values in raw.items()}
    return pa.table(arrays)


def _raw(column: RawColumn, dtype: pl.DataType) -> pa.Array:
    """A kept column as it was."""
    if isinstance(column, Coded):
        column = _with_null(column.values)[pl.Series(np.where(column.index < 0, len(column.values), column.index))]
    return column.cast(dtype).rechunk().to_arrow()


class _Writer:
    """Writes one split in row groups of ``CHUNK`` rows, whatever the sizes of the pieces."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.writer: Any = None
        self.waiting: list[pa.Table] = []
        self.rows = 0

    def add(self, table: pa.Table) -> None:
        """Take the next rows."""
        if self.writer is None:
            self.writer = open_writer(self.file, table.schema)
        self.waiting.append(table)
        self.rows += table.num_rows
        if self.rows >= CHUNK:
            whole = pa.concat_tables(self.waiting)
            full = self.rows // CHUNK * CHUNK
            self.writer.write_table(whole.slice(0, full), row_group_size=CHUNK)
            self.waiting, self.rows = [whole.slice(full)], self.rows - full

    def close(self) -> None:
        """Write the rest."""
        if self.writer is not None:
            if self.rows:
                self.writer.write_table(pa.concat_tables(self.waiting), row_group_size=CHUNK)
            self.writer.close()


def split_entry(folder: Path, split: str, rows: int) -> dict[str, Any]:
    """Return what the manifest says of a split: its rows and files."""
    files = sorted((folder / split).glob("*.parquet"))
    return {
        "rows": rows,
        "files": [
            {"file": f.relative_to(folder).as_posix(), "bytes": f.stat().st_size, "sha256": sha256_file(f)}
            for f in files
        ],
    }
