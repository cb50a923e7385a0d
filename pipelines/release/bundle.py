"""The Bundle: what is released. Weights, features, config and golden rows in one folder that proves itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ctr_models.batch import EncodedRows
from ctr_models.errors import ArtifactError, ConfigError, DataError
from ctr_models.gates.base import GateSpec
from ctr_models.model import CTRModel, ModelSpec
from ctr_models.schema import Schema
from pipelines.features.files import atomic_directory, sha256_file, sha256_tree
from pipelines.features.online import OnlineEncoder
from pipelines.features.state import FeatureState
from pipelines.features.transform import encoded_rows, transform
from pipelines.release.int8 import Int8Card, scores
from pipelines.release.reference import Reference

FORMAT = 1
MANIFEST, WEIGHTS, FEATURES, GOLDEN, CONFIG, REFERENCE, INT8 = (
    "bundle.json",
    "weights.safetensors",
    "features",
    "golden.parquet",
    "config.yaml",
    "reference.json",
    "int8.json",
)
SCORE = "__score__"
TOLERANCE = 1e-5
LIBRARIES = ("sluice", "torch", "torchrec", "polars", "numpy")
_AGAIN = "copy the bundle again from where it was made, or train again"


class Bundle:
    """A released model: raw values in, click probabilities out, on CPU, in one process.

    Made by :meth:`create` and read by :meth:`load`; both leave it ready to score.

    Args:
        directory: where it stands.
        model: in evaluation mode.
        state: the features as they were fitted.
        config: the run's configuration, as plain values.
        manifest: what ``bundle.json`` says.
    """

    def __init__(
        self,
        directory: Path,
        model: CTRModel,
        state: FeatureState,
        config: dict[str, Any],
        manifest: dict[str, Any],
    ) -> None:
        self.directory, self.model, self.state = directory, model.eval(), state
        self.config, self.manifest = config, manifest
        self.encoder = OnlineEncoder(state)

    @property
    def hash(self) -> str:
        """SHA-256 over the manifest, and through it over every file."""
        return str(self.manifest["hash"])

    @property
    def metrics(self) -> dict[str, float]:
        """What the model reached when it was trained."""
        return dict(self.manifest["metrics"])

    @property
    def gates(self) -> dict[str, str]:
        """The gate in each slot as ``name:hash``, the key of experiments and of the event log."""
        return {slot: f"{gate['name']}:{gate['hash']}" for slot, gate in self.manifest["gates"].items()}

    @cached_property
    def golden(self) -> pl.DataFrame:
        """Raw rows with the scores that this bundle must give them, in column ``__score__``."""
        return pl.read_parquet(self.directory / GOLDEN)

    @cached_property
    def reference(self) -> Reference | None:
        """How features and scores were spread in training; None if the bundle does not say."""
        return Reference.read(self.directory / REFERENCE) if REFERENCE in self.manifest["files"] else None

    @cached_property
    def int8(self) -> Int8Card | None:
        """Which layers may be computed in eight bits; None if none may, or the bundle does not say."""
        return Int8Card.read(self.directory / INT8) if INT8 in self.manifest["files"] else None

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        model: CTRModel,
        state: FeatureState,
        config: Mapping[str, Any],
        metrics: Mapping[str, float],
        golden: pl.DataFrame,
        seen: EncodedRows | None = None,
        unseen: EncodedRows | None = None,
        created: datetime | None = None,
    ) -> Bundle:
        """Write a bundle, whole or not at all.

        Args:
            directory: where it shall stand; an older bundle there is replaced.
            model: unsharded, on CPU. Its weights are copied.
            state: the fitted features.
            config: the run's configuration, as plain values.
            metrics: what the model reached; finite numbers.
            golden: some raw rows, at least one. Columns that the model does not read are dropped.
            seen: encoded training rows: how features are spread in training, which servers compare their traffic
                with. None: the bundle does not say.
            unseen: encoded rows that the model did not learn from, for what is to be known of its scores; None
                takes the training rows.
            created: for the manifest; now by default. The same inputs and time give the same bytes.

        Raises:
            DataError: no golden row, or a golden row gets a score that is not a number.
        """
        rows = _request_rows(state, golden)
        if rows.is_empty():
            raise DataError("a bundle needs at least one golden row", where=str(directory), remedy="give some rows")
        weights = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
        gates = model.gate_specs
        # Every setting is written out: a default may change, a released model may not.
        spec = ModelSpec(
            name=model.name or f"{type(model).__module__}.{type(model).__qualname__}",
            options=model.config.model_dump(mode="json"),
            gates={
                slot: GateSpec(name=gate.name, options=gate.config().model_dump(mode="json"))
                for slot, gate in sorted(gates.items())
            },
        )
        with atomic_directory(directory) as aside:
            save_file(weights, aside / WEIGHTS)
            state.save(aside / FEATURES)
            (aside / CONFIG).write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
            manifest: dict[str, Any] = {
                "format": FORMAT,
                "created": (created or datetime.now(UTC)).isoformat(timespec="seconds"),
                "model": spec.to_dict(),
                "schema": model.schema.model_dump(mode="json"),
                "gates": {slot: {"name": g.name, "hash": g.hash} for slot, g in sorted(gates.items())},
                "features": state.hash,
                "metrics": {k: float(v) for k, v in sorted(metrics.items())},
                "libraries": {name: version(name) for name in LIBRARIES},
            }
            training = model.training
            bundle = cls(aside, model, state, dict(config), manifest)
            try:
                found = bundle.score_frame(rows)
                if seen is not None:
                    bundle._measure(seen, seen if unseen is None else unseen)
            finally:
                model.train(training)
            if not np.isfinite(found).all():
                bad = int(np.flatnonzero(~np.isfinite(found))[0])
                raise DataError(
                    f"the model scores {found[bad]}",
                    where=f"{directory}: golden row {bad}",
                    remedy="the weights have diverged; lower the learning rate and train again",
                )
            rows.with_columns(pl.Series(SCORE, found)).write_parquet(aside / GOLDEN)
            manifest["files"] = sha256_tree(aside)
            manifest["hash"] = _hash(manifest)
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            try:
                made = cls.load(aside)  # before it takes the place of an older one
            except ArtifactError as error:
                where = error.where.replace(str(aside), str(directory))
                raise ArtifactError(error.problem, where=where, remedy=error.remedy) from None
        made.directory = Path(directory)
        return made

    @classmethod
    def load(cls, directory: Path | str) -> Bundle:
        """Read a bundle, check every hash, rebuild the model, and replay the golden rows.

        They are scored as a batch, as a request of candidates with nothing in common, and each as the one candidate
        of its own user; all must give the recorded scores within 1e-5.

        Raises:
            ArtifactError: naming the file, what was expected, what was found, and the remedy.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        _check_files(directory, manifest["files"])
        state = FeatureState.load(directory / FEATURES)
        if state.hash != manifest["features"]:
            raise _mismatch(directory / FEATURES, "features hash", manifest["features"], state.hash)
        try:
            schema = Schema.model_validate(manifest["schema"])
            _check_schema(directory, schema, state.schema())
            spec = ModelSpec.parse(manifest["model"])
            model = spec.build(schema)
        except (ConfigError, ValidationError) as error:
            raise ArtifactError(
                f"this installation can't build the model: {' '.join(str(error).split())}",
                where=str(directory / MANIFEST),
                remedy="install the package that brings it, or the version of sluice that wrote it",
            ) from None
        for slot, gate in spec.all_gates.items():
            if gate.hash != manifest["gates"][slot]["hash"]:
                raise _mismatch(
                    directory / MANIFEST,
                    f"hash of gate {gate.name!r} in slot {slot!r}",
                    manifest["gates"][slot]["hash"],
                    gate.hash,
                    "install the version of the gate's package that trained it",
                )
        try:
            model.load_state_dict(load_file(directory / WEIGHTS), strict=True)
        except (RuntimeError, SafetensorError) as error:
            raise ArtifactError(
                f"weights don't fit the model: {' '.join(str(error).split())}",
                where=str(directory / WEIGHTS),
                remedy=_versions(manifest),
            ) from None
        config = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
        bundle = cls(directory, model, state, config, manifest)
        bundle._replay()
        _ = bundle.reference, bundle.int8  # read now: the folder may hold the next bundle later
        if _read_manifest(directory)["hash"] != bundle.hash:
            raise ArtifactError(
                "another bundle took its place while it was read", where=str(directory), remedy="load it again"
            )
        return bundle

    def score_frame(self, frame: pl.DataFrame, *, source: str = "rows", batch_size: int = 16384) -> np.ndarray:
        """Score raw rows as the nightly batch does.

        Args:
            frame: raw columns; those that the model does not read are ignored, missing ones are null.
            source: the file, for messages.
            batch_size: rows in one forward pass.

        Returns:
            Click probabilities, (N,) float32, in the order of the rows.
        """
        encoded = transform(self.state, frame.lazy(), source=source).collect()
        rows = encoded_rows(encoded, self.state.schema())
        parts = [self.score_rows(rows, slice(i, i + batch_size)) for i in range(0, len(rows), batch_size)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)

    def score_request(
        self,
        user: Mapping[str, Any],
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Score the candidates of one request, each as the row ``{**user, **context, **candidate}`` without nulls.

        What no candidate gives for itself is encoded once and, by models that can, looked up and multiplied once.

        Returns:
            Click probabilities, (N,) float32, in the order of the candidates.

        Raises:
            RequestError: a value can't be encoded; ``where`` is its path.
        """
        if not self.model.shares:
            return self.score_rows(self.encoder.encode(user, context, candidates))
        with torch.inference_mode():
            logits = self.model.scores(self.encoder.candidates(user, context, candidates))  # (N,)
            return torch.sigmoid(logits.float()).numpy()

    def score_rows(self, rows: EncodedRows, chosen: slice | None = None) -> np.ndarray:
        """Score encoded rows in one forward pass: probabilities, (N,) float32."""
        with torch.inference_mode():
            logits = self.model(rows.batch(chosen))  # (N,)
            return torch.sigmoid(logits.float()).numpy()

    def _measure(self, seen: EncodedRows, unseen: EncodedRows) -> None:
        """Write what rows tell of the model beside its weights."""
        Reference.of(seen, scores(self.model, unseen)).write(self.directory / REFERENCE)
        int8 = Int8Card.of(self.model, seen, unseen)
        if int8 is not None:
            int8.write(self.directory / INT8)

    def _replay(self) -> None:
        golden = self.golden
        expected, rows = golden[SCORE].to_numpy(), golden.drop(SCORE)
        ways = {
            "batch": self.score_frame(rows),
            "request": self.score_request({}, {}, rows.to_dicts()),
            "user's own request": np.concatenate([self._score_alone(row) for row in rows.to_dicts()]),
        }
        for way, found in ways.items():
            wrong = np.flatnonzero(~(np.abs(found - expected) <= TOLERANCE))
            if len(wrong):
                row = int(wrong[0])
                raise ArtifactError(
                    f"expected score {expected[row]:.7f}, found {found[row]:.7f} (scored as a {way})",
                    where=f"{self.directory / GOLDEN}: row {row}",
                    remedy=_versions(self.manifest),
                )

    def _score_alone(self, row: Mapping[str, Any]) -> np.ndarray:
        """Score a row as a request of one candidate, with the columns of the item apart from all others."""
        spec = self.state.spec
        item = {c.name if c.from_log else c.column for c in spec.direct if c.role == "item"}
        own = {name: value for name, value in row.items() if name in item}
        return self.score_request({name: value for name, value in row.items() if name not in item}, {}, [own])


def _request_rows(state: FeatureState, frame: pl.DataFrame) -> pl.DataFrame:
    """The columns of a request, in the order of the spec; those that the frame lacks stay away."""
    return frame.select([c for c in state.spec.request_columns if c in frame.columns])


def _hash(manifest: Mapping[str, Any]) -> str:
    content = {k: v for k, v in manifest.items() if k != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            "no bundle here" if directory.is_dir() else "no such folder",
            where=str(path if directory.is_dir() else directory),
            remedy=f"a bundle is a folder with {MANIFEST}; sluice train makes one",
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"not a bundle's manifest ({error})", where=str(path), remedy=_AGAIN) from None
    if found != FORMAT:
        raise ArtifactError(
            f"format {found!r}, this version of sluice reads {FORMAT}",
            where=str(path),
            remedy=f"install sluice {manifest.get('libraries', {}).get('sluice', '?')}, which wrote it",
        )
    if manifest.get("hash") != _hash(manifest):
        raise _mismatch(path, "hash", str(manifest.get("hash")), _hash(manifest))
    return manifest


def _check_files(directory: Path, expected: Mapping[str, str]) -> None:
    for name, digest in expected.items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError("the file is missing", where=str(path), remedy=_AGAIN)
        found = sha256_file(path)
        if found != digest:
            raise _mismatch(path, "SHA-256", digest, found)


def _check_schema(directory: Path, model: Schema, state: Schema) -> None:
    """The model must read what the features give: same fields, same order, same table sizes."""

    def inputs(schema: Schema) -> list[tuple[str, int, str]]:
        return [(f.name, getattr(f, "rows", 0), getattr(f, "kind", "numeric")) for f in schema.fields]

    ours, given = inputs(model), inputs(state)
    if ours != given:
        differing: list[tuple[object, object]] = [(a, b) for a, b in zip(ours, given, strict=False) if a != b]
        differing = differing or [(len(ours), len(given))]
        raise ArtifactError(
            f"the model reads {differing[0][0]}, the features give {differing[0][1]}",
            where=str(directory / FEATURES),
            remedy=_AGAIN,
        )


def _mismatch(path: Path, what: str, expected: str, found: str, remedy: str = _AGAIN) -> ArtifactError:
    return ArtifactError(
        f"{what} expected {expected[:16]}, found {found[:16]}", where=os.fspath(path), remedy=remedy
    )


def _versions(manifest: Mapping[str, Any]) -> str:
    """A remedy that names the libraries that changed since the bundle was made."""
    changed = [
        f"{name} {was} (here {version(name)})"
        for name, was in manifest.get("libraries", {}).items()
        if was != version(name)
    ]
    return f"made with {', '.join(changed)}; install those" if changed else _AGAIN
