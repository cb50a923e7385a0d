"""The registry: Bundles as versions of a registered MLflow model, found by name and alias."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import polars as pl

from ctr_models.errors import ArtifactError, nearest
from pipelines.features.files import atomic_directory
from pipelines.release.store import connect, default_uri, experiment_id, locked, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipelines.release.bundle import Bundle

SCHEME = "models:/"
_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


@dataclass(frozen=True)
class Release:
    """One registered version.

    Args:
        name: of the registered model.
        version: 1, 2, ...
        aliases: for example ``champion``.
        metrics: what the bundle reached.
        gates: ``name:hash`` by slot.
        bundle_hash: of the bundle's manifest.
        created: milliseconds since 1970.
        run_id: the MLflow run that made it.
        run: name of the run's folder, where one is known.
    """

    name: str
    version: int
    aliases: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    gates: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    bundle_hash: str = ""
    created: int = 0
    run_id: str = ""
    run: str = ""

    @property
    def uri(self) -> str:
        """The URI that finds this version."""
        return f"{SCHEME}{self.name}/{self.version}"


def register(
    bundle_dir: Path,
    name: str,
    tracking_uri: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> int:
    """Log a bundle as an MLflow model (from code, nothing pickled) and register it under a name.

    Args:
        bundle_dir: a whole bundle; it is loaded, and so verified, first.
        name: of the registered model; made if it is new.
        tracking_uri: None is the store under ``runs``.
        run_id: the run that trained it; None registers without a run.
        tags: more tags of the version.

    Returns:
        The new version.

    Raises:
        ArtifactError: the bundle is damaged, or the store can't be reached.
    """
    from pipelines.release.bundle import Bundle

    bundle = Bundle.load(bundle_dir)
    uri = tracking_uri or default_uri()
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    if run_id is None:
        experiment = experiment_id(client, uri, name)
    else:
        experiment = client.get_run(run_id).info.experiment_id
    try:
        with locked(uri):
            logged = client.create_logged_model(
                experiment, name=name, source_run_id=run_id, model_type="sluice", params=_model_params(bundle)
            )
        with tempfile.TemporaryDirectory() as folder:
            _save_pyfunc(bundle, Path(folder) / "model", logged)
            client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
        with locked(uri):
            client.finalize_logged_model(logged.model_id, "READY")
            if run_id is not None:
                _link_to_run(client, run_id, logged.model_id)
            _ensure_model(client, name)
            made = client.create_model_version(
                name,
                source=logged.artifact_location,
                run_id=run_id,
                # Without a run MLflow would look the model up in the process's own default store.
                model_id=logged.model_id if run_id else None,
                tags={**_tags(bundle), **(tags or {})},
                await_creation_for=0,
            )
    except MlflowException as error:
        raise ArtifactError(
            f"MLflow refused the bundle: {shown(str(error).splitlines()[0])[:300]}", where=f"{shown(uri)}: {name}"
        ) from None
    return int(made.version)


def locate(uri: str, tracking_uri: str | None = None) -> Release:
    """Find the version that ``models:/name@alias`` or ``models:/name/3`` means.

    Raises:
        ArtifactError: no such name, alias or version, naming the nearest.
    """
    match = _URI.match(uri)
    if match is None:
        raise ArtifactError(
            "not a model's URI", where=uri, remedy="write models:/name@alias, models:/name/version, or a path"
        )
    name, alias = match["name"], match["alias"]
    found = releases(name, tracking_uri)
    if alias is not None:
        chosen = [r for r in found if alias in r.aliases]
        known = sorted({a for r in found for a in r.aliases})
        hint = (
            nearest(alias, known) if known else f"sluice promote {name} --version {found[-1].version} --to {alias}"
        )
        problem = f"model {name!r} has no alias {alias!r}"
    else:
        chosen = [r for r in found if r.version == int(match["version"])]
        hint = f"versions: {', '.join(str(r.version) for r in found)}"
        problem = f"model {name!r} has no version {match['version']}"
    if not chosen:
        raise ArtifactError(problem, where=uri, remedy=hint)
    return chosen[0]


def releases(name: str, tracking_uri: str | None = None) -> list[Release]:
    """Return every version of a name, oldest first, with its aliases.

    Raises:
        ArtifactError: no such name, naming the nearest.
    """
    uri = tracking_uri or default_uri()
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        # Stores differ in the type of an alias's version: some give text, some integers.
        by_version: dict[int, list[str]] = {}
        for alias, number in (client.get_registered_model(name).aliases or {}).items():
            by_version.setdefault(int(number), []).append(alias)
    except MlflowException:
        raise ArtifactError(
            f"no registered model {name!r}", where=shown(uri), remedy=nearest(name, model_names(uri))
        ) from None
    found = [v for v in _pages(client, f"name = '{name}'") if v.name == name]
    if not found:
        raise ArtifactError(f"model {name!r} has no version", where=shown(uri), remedy="sluice train registers one")
    return sorted((_release(v, by_version) for v in found), key=lambda r: r.version)


def of_run(name: str, run: str, tracking_uri: str | None = None) -> Release | None:
    """Return the newest version that a run registered, by the name of the run's folder; None without one."""
    if name not in model_names(tracking_uri):
        return None
    return next((r for r in reversed(releases(name, tracking_uri)) if r.run == run), None)


def model_names(tracking_uri: str | None = None) -> list[str]:
    """Return the names of all registered models."""
    client = connect(tracking_uri or default_uri())
    names, token = [], None
    while True:
        page = client.search_registered_models(page_token=token)
        names += [m.name for m in page]
        token = page.token
        if not token:
            return sorted(names)


def resolve(uri: str, tracking_uri: str | None = None, cache: Path | None = None) -> Path:
    """Return the local folder of a bundle, fetched if it lies elsewhere.

    Args:
        uri: a path, ``models:/name@alias`` or ``models:/name/version``.
        tracking_uri: None is the store under ``runs``.
        cache: where fetched bundles are kept, by name and version; None is ``~/.cache/sluice``.

    Raises:
        ArtifactError: nothing is found there.
    """
    if not uri.startswith(SCHEME):
        return Path(uri)
    return fetch(locate(uri, tracking_uri), tracking_uri, cache)


def fetch(release: Release, tracking_uri: str | None = None, cache: Path | None = None) -> Path:
    """Return the local folder of a version's bundle; files that are local already are not copied."""
    store = tracking_uri or default_uri()
    client = connect(store)
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    source = client.get_model_version_download_uri(release.name, str(release.version))
    local = _local_path(source)
    if local is not None:
        return _bundle_in(local)
    kept = (cache or Path.home() / ".cache" / "sluice") / f"{release.name}-{release.version}-{release.bundle_hash}"
    if not kept.is_dir():
        try:
            with atomic_directory(kept) as aside:
                mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(aside), tracking_uri=store)
        except (MlflowException, OSError) as error:
            raise ArtifactError(
                f"can't fetch the bundle: {str(error).splitlines()[0][:300]}", where=f"{release.uri} ({source})"
            ) from None
    return _bundle_in(kept)


def _local_path(uri: str) -> Path | None:
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(uri) if not parts.scheme else None


def _bundle_in(folder: Path) -> Path:
    """The bundle inside a logged model's folder."""
    for manifest in sorted(folder.rglob("bundle.json")):
        return manifest.parent
    raise ArtifactError("no bundle in the registered model", where=str(folder), remedy="register it again")


def _pages(client: MlflowClient, query: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_model_versions(query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _link_to_run(client: MlflowClient, run_id: str, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def _model_params(bundle: Bundle) -> dict[str, str]:
    params = {"model": bundle.model.name, "features": bundle.manifest["features"], "bundle": bundle.hash}
    return params | {f"gate.{slot}": gate for slot, gate in bundle.gates.items()}


def _tags(bundle: Bundle) -> dict[str, str]:
    """What ``releases`` and a promotion need to know without fetching the bundle."""
    metrics = {f"metric.{name}": repr(value) for name, value in bundle.metrics.items()}
    return _model_params(bundle) | metrics


def _release(found: Any, aliases: Mapping[int, list[str]]) -> Release:
    def tagged(prefix: str) -> dict[str, str]:
        return {k.removeprefix(prefix): v for k, v in sorted(found.tags.items()) if k.startswith(prefix)}

    return Release(
        name=found.name,
        version=int(found.version),
        aliases=tuple(sorted(aliases.get(int(found.version), ()))),
        metrics={k: float(v) for k, v in tagged("metric.").items()},
        gates=tagged("gate."),
        model=found.tags.get("model", ""),
        bundle_hash=found.tags.get("bundle", ""),
        created=int(found.creation_timestamp or 0),
        run_id=found.run_id or "",
        run=found.tags.get("run", ""),
    )


def _save_pyfunc(bundle: Bundle, path: Path, logged: Any) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model

    from pipelines.release.bundle import SCORE

    rows = bundle.golden.drop(SCORE)
    description = Model(
        artifact_path=logged.artifact_location,
        run_id=logged.source_run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
    )
    mlflow.pyfunc.save_model(
        path,
        mlflow_model=description,
        python_model=str(Path(__file__).with_name("pyfunc.py")),
        artifacts={"bundle": str(bundle.directory)},
        signature=_signature(rows),
        input_example=rows.head(3).to_pandas(),
        pip_requirements=[f"sluice=={version('sluice')}"],
    )


def _signature(rows: pl.DataFrame) -> Any:
    """Raw columns in, one probability a row out; every column may be left out and then counts as null."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType
    from mlflow.types import Schema as MlflowSchema
    from mlflow.types.schema import Array

    def spec(name: str) -> ColSpec:
        column = rows[name]
        kind = column.dtype
        inner = kind.inner if isinstance(kind, pl.List) else kind
        if inner.is_float() or (inner.is_integer() and column.null_count()):
            type_ = DataType.double  # pandas has no gaps in whole numbers
        elif inner.is_integer():
            type_ = DataType.long
        elif inner == pl.Boolean:
            type_ = DataType.boolean
        elif inner.is_temporal():
            type_ = DataType.datetime
        else:
            type_ = DataType.string
        return ColSpec(Array(type_) if isinstance(kind, pl.List) else type_, name, required=False)

    return ModelSignature(
        inputs=MlflowSchema([spec(n) for n in rows.columns]), outputs=MlflowSchema([ColSpec(DataType.float)])
    )
