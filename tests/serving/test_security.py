"""Keys: kept as hashes, compared in constant time, changed without a restart, limited in scope and rate."""

from __future__ import annotations

import hmac
import json
import os
import timeit
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from typer.testing import CliRunner

from ctr_models.errors import ConfigError
from pipelines.cli import build_app
from serving import key_commands
from serving.monitoring import Metrics
from serving.observe import Observe
from serving.schemas import Refused
from serving.security import GROUPS, GUESSES, Guard, KeyFile, Keyring, needed_scope, new_key

ASKED = {
    "/v1/score": "score",
    "/v1/score:batch": "score",
    "/v2/models/x/infer": "score",
    "/v2": "score",
    "/v1/events": "events",
    "/v1/experiments": "admin",
    "/metrics": "admin",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def client(file: Path | None, folder: Path | None = None, address: str = "192.0.2.1") -> TestClient:
    def say(request):
        return PlainTextResponse("in")

    paths = (
        "/healthz",
        "/v1/score",
        "/v1/score:batch",
        "/v1/events",
        "/v1/experiments",
        "/metrics",
        "/v2/models/x/infer",
        "/v2",
    )
    metrics = Metrics()
    app = Starlette(routes=[Route(path, say, methods=["GET", "POST"]) for path in paths])
    keys = None if file is None else Keyring(file, every=0)
    app.add_middleware(Guard, keys=keys, metrics=metrics, folder=folder)
    app.add_middleware(Observe, metrics=metrics)
    return TestClient(app, client=(address, 50_000))


def status(server: TestClient, path: str, token: str | None = None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return server.post(path, headers=headers).status_code


def test_the_file_holds_no_key(file) -> None:
    token, key = new_key({"score"})
    KeyFile(keys=(key,)).write(file)
    secret = token.rpartition(f"{key.id}_")[2]
    assert secret not in file.read_text()
    assert KeyFile.read(file).find(token) == key


def test_scopes(file) -> None:
    tokens, keys = {}, []
    for scope in ("score", "events", "admin"):
        tokens[scope], key = new_key({scope})
        keys.append(key)
    KeyFile(keys=tuple(keys)).write(file)
    server = client(file)
    for path, scope in ASKED.items():
        assert needed_scope(path) == scope
        for name, token in tokens.items():
            assert status(server, path, token) == (200 if name in (scope, "admin") else 403)
        assert status(server, path) == 401
    assert status(server, "/healthz") == 200
    assert client(None).post("/v1/experiments").status_code == 200


def test_a_moment_without_a_zone_is_refused_when_the_file_is_read(file) -> None:
    _, key = new_key({"score"}, expires=datetime(2099, 1, 1, tzinfo=UTC))
    KeyFile(keys=(key,)).write(file)
    file.write_text(file.read_text().replace("2099-01-01T00:00:00Z", "2099-01-01T00:00:00"))
    with pytest.raises(ConfigError, match="timezone"):
        KeyFile.read(file)


def test_what_is_refused_says_why(file) -> None:
    token, key = new_key({"score"})
    KeyFile(keys=(key,)).write(file)
    server = client(file)
    answer = server.post("/v1/events", headers={"X-API-Key": token})
    assert (answer.status_code, answer.json()["detail"][0]["msg"]) == (403, "the key lacks scope 'events'")
    answer = server.post("/v1/score", headers={"Authorization": "Bearer nonsense"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "nonsense" not in answer.text


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:-1] + ("A" if t[-1] != "A" else "B"),
        lambda t: t + "A",
        lambda t: t.replace("sluice_", "sluice-"),
        lambda t: "sluice_00000000_" + t[-43:],
        lambda t: "",
        lambda t: t.upper(),
        lambda t: "sluice_" + "0" * 8 + "_" + "é" * 43,
        lambda t: t + "\x00",
    ],
)
def test_a_wrong_key_is_none(change) -> None:
    token, key = new_key({"score"})
    assert KeyFile(keys=(key,)).find(change(token)) is None


def test_every_token_is_compared_in_constant_time(monkeypatch) -> None:
    token, key = new_key({"score"})
    keys, compared = KeyFile(keys=(key,)), []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    for one in (token, "nonsense", token[:-1] + "!", f"sluice_00000000_{'A' * 43}"):
        keys.find(one)
    assert compared == [(64, 64)] * 4


def test_an_expired_key_is_none() -> None:
    token, key = new_key({"score"}, expires=datetime.now(UTC) - timedelta(seconds=1))
    assert KeyFile(keys=(key,)).find(token) is None
    token, key = new_key({"score"}, expires=datetime.now(UTC) + timedelta(hours=1))
    assert KeyFile(keys=(key,)).find(token) == key


def test_keys_change_without_a_restart(file, caplog) -> None:
    old, first = new_key({"score"})
    new, second = new_key({"score"})
    KeyFile(keys=(first,)).write(file)
    server = client(file)
    assert (status(server, "/v1/score", old), status(server, "/v1/score", new)) == (200, 401)
    KeyFile(keys=(first, second)).write(file)
    assert (status(server, "/v1/score", old), status(server, "/v1/score", new)) == (200, 200)
    KeyFile(keys=(second,)).write(file)
    assert (status(server, "/v1/score", old), status(server, "/v1/score", new)) == (401, 200)
    file.write_text('{"keys": [')  # half written by somebody's editor
    assert status(server, "/v1/score", new) == 200
    assert "the keys stay as they were" in caplog.text
    os.unlink(file)
    assert status(server, "/v1/score", new) == 200


def test_a_change_while_the_server_begins_is_not_missed(file, monkeypatch) -> None:
    old, first = new_key({"score"})
    KeyFile(keys=(first,)).write(file)
    read = KeyFile.read.__func__  # type: ignore[attr-defined]

    def then_revoked(cls, path: Path) -> KeyFile:
        found: KeyFile = read(cls, path)
        KeyFile().write(path)
        return found

    monkeypatch.setattr(KeyFile, "read", classmethod(then_revoked))
    keys = Keyring(file, every=0)
    monkeypatch.undo()
    assert keys.find(old) is None


def test_who_could_read_the_file_still_can_and_nobody_else(file) -> None:
    KeyFile().write(file)
    assert file.stat().st_mode & 0o777 == 0o600
    KeyFile().write(file)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)  # for the user of a container
    KeyFile().write(file)
    assert file.stat().st_mode & 0o777 == 0o644


def test_too_many_requests_are_told_when_to_come_back(file) -> None:
    token, key = new_key({"score"}, rate=0.5, burst=2)
    other, second = new_key({"score"})
    KeyFile(keys=(key, second)).write(file)
    server = client(file)
    answers = [server.post("/v1/score", headers={"X-API-Key": token}) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 2
    assert status(server, "/v1/score", other) == 200


def test_wrong_keys_of_an_address_are_counted_by_all_workers_together(file, tmp_path) -> None:
    token, key = new_key({"score"})
    KeyFile(keys=(key,)).write(file)
    (folder := tmp_path / "shared").mkdir()
    workers = [client(file, folder) for _ in range(2)]
    told = [status(workers[i % 2], "/v1/score", "wrong") for i in range(GUESSES + 4)]
    assert told == [401] * GUESSES + [429] * 4
    answer = client(file, folder).post("/v1/score", headers={"X-API-Key": "wrong"})  # of a replacement
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert [status(one, "/v1/score", token) for one in workers] == [200, 200]
    assert [status(one, "/v1/score") for one in workers] == [401, 401]  # no key is no guess
    assert status(client(file, folder, "192.0.2.2"), "/v1/score", "wrong") == 401


def test_whoever_has_many_addresses_fills_no_memory(file, tmp_path) -> None:
    KeyFile().write(file)
    keys = Keyring(file)
    guard = Guard(PlainTextResponse("in"), keys, Metrics(), tmp_path)
    for i in range(3 * GROUPS):
        scope = {
            "type": "http",
            "path": "/v1/score",
            "headers": [(b"x-api-key", b"wrong")],
            "client": (f"::{i:x}", 1),
        }
        with pytest.raises(Refused):
            guard._key(keys, scope)
    assert len(list(tmp_path.glob("*.rate"))) <= GROUPS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the keys can't be read"),
        ("[]", "keys.json"),
        ('{"keys": [{"id": "00000000", "hash": "ab", "scopes": ["score"]}]}', "hash"),
        ('{"keys": [{"id": "00000000", "hash": "' + "0" * 64 + '", "scopes": ["scroe"]}]}', "scopes"),
        ('{"kyes": []}', "keys"),
        (KeyFile.model_construct(keys=(new_key({"score"})[1],) * 2).model_dump_json(), "two keys have the same id"),
    ],
)
def test_a_wrong_file_is_refused_at_the_start(file, content, message) -> None:
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Keyring(file)


def test_the_commands(file) -> None:
    def call(*words: str):
        return CliRunner().invoke(build_app(), ["keys", *words])

    made = call("new", str(file), "--scopes", "score,events", "--rate", "5", "--note", "shop")
    assert made.exit_code == 0
    token = made.stdout.split()[0]
    key = KeyFile.read(file).find(token)
    assert key is not None
    assert (key.scopes, key.rate, key.note) == ({"score", "events"}, 5, "shop")
    assert file.stat().st_mode & 0o077 == 0
    listed = call("list", str(file)).stdout
    assert key.id in listed and "shop" in listed and token not in listed and key.hash not in listed
    (told,) = json.loads(call("list", str(file), "--json", "-").stdout)
    assert (told["id"], told["rate"]) == (key.id, 5.0) and "hash" not in told
    assert call("revoke", str(file), key.id).exit_code == 0
    assert json.loads(file.read_text()) == {"keys": []}
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="no scope 'scroe'. did you mean 'score'"):
        new_key({"scroe"})
    missing = call("revoke", str(file), "00000000")
    assert isinstance(missing.exception, ConfigError)


def test_keys_that_are_made_at_once_are_all_kept(file) -> None:
    def make(i: int) -> None:
        key_commands.new(file, "score", None, 10, None, str(i))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(40)))
    assert sorted(int(key.note) for key in KeyFile.read(file).keys) == list(range(40))


def test_a_key_among_many_is_found_as_quickly() -> None:
    made = [new_key({"score"}) for _ in range(2000)]
    few, many = KeyFile(keys=(made[-1][1],)), KeyFile(keys=tuple(key for _, key in made))

    def seconds(keys: KeyFile) -> float:
        return min(timeit.repeat(lambda: keys.find(made[-1][0]), number=100, repeat=5))

    assert seconds(many) < 10 * seconds(few)
