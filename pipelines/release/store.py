"""The MLflow store: where it is by default, how it is opened, and how it is kept quiet and orderly."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ctr_models.errors import ArtifactError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
_SERVERS = ("postgresql", "mysql", "mssql")


class _Held(threading.local):
    """The stores that this thread holds, so that a function that locks may call another."""

    def __init__(self) -> None:
        self.paths: set[Path] = set()


_held = _Held()


def default_uri(workdir: Path = Path("runs")) -> str:
    """Return the tracking URI of a work directory: SQLite beside the runs.

    Example:
        >>> default_uri(Path("/data/runs"))
        'sqlite:////data/runs/mlflow.db'
    """
    return f"{_SQLITE}{Path(workdir).resolve() / 'mlflow.db'}"


def shown(tracking_uri: str) -> str:
    """Return a tracking URI as messages and artefacts may hold it: without user and password.

    Example:
        >>> shown("postgresql://sluice:secret@db/mlflow")
        'postgresql://***@db/mlflow'
    """
    return re.sub(r"(?<=://)[^/@]*@", "***@", tracking_uri)


def quiet() -> None:
    """Keep MLflow's, Alembic's and Git's remarks off the screen; their errors still raise."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow  # noqa: F401  (sets its own levels when it is imported)

    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"mlflow\..*")


def connect(tracking_uri: str) -> MlflowClient:
    """Open a store; a new SQLite store is made whole before anybody else sees it.

    Raises:
        ArtifactError: the store can't be reached.
    """
    quiet()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    try:
        with locked(tracking_uri):
            if tracking_uri.split(":")[0].split("+")[0] in _SERVERS:
                # MLflow would try for two minutes before it says a word.
                create_engine(tracking_uri, poolclass=NullPool).connect().close()
            client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
            client.search_experiments(max_results=1)  # the first query makes the tables
            return client
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise ArtifactError(
            f"can't open the MLflow store: {shown(str(error).splitlines()[0])[:300]}",
            where=shown(tracking_uri),
            remedy="give another with --tracking-uri",
        ) from None


def experiment_id(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """Return the id of the named experiment, made if need be, with its files beside a SQLite store."""
    with locked(tracking_uri):
        known = client.get_experiment_by_name(name)
        if known is not None:
            if known.lifecycle_stage == "deleted":
                client.restore_experiment(known.experiment_id)
            return str(known.experiment_id)
        path = _sqlite_path(tracking_uri)
        location = (path.parent / "mlartifacts").as_uri() if path is not None else None
        return str(client.create_experiment(name, artifact_location=location))


@contextmanager
def locked(tracking_uri: str) -> Iterator[None]:
    """Hold a SQLite store for one thread of one process at a time; a server keeps its own order."""
    path = _sqlite_path(tracking_uri)
    if path is None or path in _held.paths:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _held.paths.add(path)
        try:
            yield
        finally:
            _held.paths.discard(path)


def _sqlite_path(tracking_uri: str) -> Path | None:
    if not tracking_uri.startswith(_SQLITE):
        return None
    return Path(tracking_uri.removeprefix(_SQLITE)).resolve()
