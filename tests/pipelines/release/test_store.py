"""The store is made whole, held by one at a time, and tidy. Opening at once: see test_registry."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ctr_models.errors import ArtifactError
from pipelines.release.store import connect, default_uri, experiment_id, locked


def test_the_lock_is_held_by_one_thread_and_lets_it_in_again(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    entered = threading.Event()

    def other() -> None:
        with locked(uri):
            entered.set()

    with locked(uri), locked(uri):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(5)
    assert entered.is_set()


def test_files_of_an_experiment_lie_beside_the_database(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    client = connect(uri)
    made = experiment_id(client, uri, "clicks")
    assert experiment_id(client, uri, "clicks") == made
    assert client.get_experiment(made).artifact_location.startswith(tmp_path.as_uri())


@pytest.mark.parametrize("uri", ["sqlite:////proc/nowhere/mlflow.db", "postgresql://nobody:secret@127.0.0.1:1/x"])
def test_a_store_that_cant_be_opened_is_named_but_not_its_password(uri: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        connect(uri)
    named = uri.replace("nobody:secret", "***")
    assert str(caught.value).startswith(f"{named}: can't open the MLflow store")
    assert "secret" not in str(caught.value)
