"""The page at /ui: what it shows, to whom, and how it looks in a browser."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle, example_log
from serving import ui
from serving.analysis import ArmResult, Rate, Results
from serving.app import create_app
from serving.database import ASSIGNMENTS, MATCHES, Database, Row, Unavailable
from serving.security import KeyFile, new_key
from serving.settings import Settings

NOW = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
EVIL = '<script>alert("x")</script>'
HEALTH: dict[str, Any] = {"status": "ready", "models": [], "degraded": []}
ARMS = [{"name": "open"}, {"name": "gated", "bundle": "next"}, {"name": "deep", "bundle": "next"}]
EXPERIMENT: dict[str, Any] = {
    "name": "home-gates",
    "control": "open",
    "arms": ARMS,
    "online": {"guardrails": [{"metric": "ctr", "bound": 0.02}], "shadow": ["deep"], "epsilon": 0.25},
}


class Browser:
    """A headless Chromium, asked through a pipe."""

    def __init__(self, program: str, profile: Path) -> None:
        asked, self._ask = os.pipe()
        self._told, told = os.pipe()
        switches = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        switches += "disable-component-update disable-sync hide-scrollbars remote-debugging-pipe"
        command = [program, "--headless", *(f"--{one}" for one in switches.split()), f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{asked} 4>&{told}', "bash", *command, "about:blank"],
            pass_fds=(asked, told),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(asked)
        os.close(told)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.happened: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """Ask the browser for something, and wait for its answer."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, told
                return dict(told["result"])
            self.happened.append(told)

    def show(self, url: str, width: int, height: int) -> None:
        """Open a page in a window, or on a phone, of a size."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.happened.clear()
        self.call("Page.navigate", url=url)
        while not any(one.get("method") == "Page.loadEventFired" for one in self.happened):
            self.happened.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """Return what an expression is on the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path: Path) -> bytes:
        """Keep a picture of the whole page."""
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        path.write_bytes(data)
        return data

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)
        os.close(self._ask)
        os.close(self._told)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._told], [], [], 90)
            assert ready, "the browser says nothing"
            self._rest += os.read(self._told, 2**16)
        one, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(one))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    made = Browser(program, tmp_path / "profile")
    yield made
    made.close()


def arm(name: str, **more: Any) -> ArmResult:
    told = {"role": "challenger", "share": 0.5, "paused": None, "paused_at": None, "units": 12, "requests": 20}
    rate = Rate(value=0.1, low=0.05, high=0.15)
    told |= {"shown": 200, "clicks": 20, "conversions": 0, "ctr": rate, "conversion_rate": Rate(value=0.0)}
    told |= {"off_policy_ctr": Rate(value=None), "off_policy_requests": 0}
    return ArmResult(name=name, **{**told, **more})


def results(*arms: ArmResult, **more: Any) -> Results:
    told = {"experiment": "gates", "version": 1, "state": "running", "primary": "ctr", "interval": "sequential"}
    told |= {"since": NOW, "until": NOW, "effects": [], "guardrails": [], "sample_ratio": None, "mixed_units": 0}
    told |= {"epsilon": 0.0, "problems": [], "seconds": 0.1, "arms": list(arms)}
    return Results(**{**told, **more})


def test_everything_is_escaped_and_nothing_is_asked_from_elsewhere() -> None:
    one = results(arm("open"), arm("gated", paused=EVIL, paused_at=NOW), problems=[EVIL], experiment=EVIL)
    slot = {"slot": EVIL, "source": EVIL, "problem": EVIL}
    degraded = [{"part": EVIL, "reason": EVIL}]
    health = {
        **HEALTH,
        "models": [slot],
        "degraded": degraded,
        "reason": EVIL,
        "events": {"state": EVIL, "reason": EVIL},
    }
    scores = {(EVIL, "gated"): np.array([0.1]), ("", EVIL): np.array([0.2])}
    health["events"] |= {"spooled_bytes": 0, "waiting": 0}
    text = ui.render(health, experiments=[one], scores=scores, problem=EVIL, now=NOW)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 14
    assert re.findall(r"(?:src|href)\s*=\s*(\S+?)>", text) == ['"data:,"'] and "url(" not in text
    assert " style=" not in text and "on load" not in text


def test_intervals_lie_on_one_line_and_histograms_hold_every_score() -> None:
    one = results(arm("a", ctr=Rate(value=0.2, low=0.1, high=0.3)), arm("b", ctr=Rate(value=None)))
    assert ui._ranges({one.name: one.ctr for one in one.arms}) == {"a": {"low": 6, "value": 120, "high": 234}}
    drawn = ui._histogram("a", np.array([0.0, 0.5, 0.5, 1.0]), 1.0)
    assert [bar["height"] for bar in drawn["bars"]] == [35, 70, 35] and drawn["count"] == 4
    assert all(bar["y"] + bar["height"] == 73 for bar in drawn["bars"])


def test_rankings_that_random_order_judges_have_figures_or_say_that_it_is_too_early() -> None:
    known = arm("deep", role="shadow", share=None, off_policy_requests=1234)
    known = known.model_copy(update={"off_policy_ctr": Rate(value=0.2, low=0.11, high=0.29)})
    few = arm("open", off_policy_requests=3, off_policy_ctr=Rate(value=0.3333))

    def rows(*arms: ArmResult, **more: Any) -> list[list[str]]:
        page = ui.render(HEALTH, experiments=[results(*arms, **more)], scores={}, now=NOW)
        body = re.findall(r'<table class="own">.*?<tbody>(.*?)</tbody>', page, re.S)
        cells = [re.findall(r"<td.*?>(.*?)</td>", row, re.S) for one in body for row in one.split("</tr>")[:-1]]
        return [[" ".join(re.sub(r"<.*?>", "", cell).split()) for cell in row] for row in cells]

    told = [["open", "3", "not enough yet", ""], ["deep", "1,234", "0.2000 [0.1100, 0.2900]", ""]]
    assert rows(few, known) == told
    assert rows(arm("open"), epsilon=0.1) == [["open", "0", "not enough yet", ""]]
    assert rows(arm("open")) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("main", "next")):
        example_bundle(made / "bundles" / name, seed=seed)
    return made


@pytest.fixture
def bundles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.chdir(folder)
    return "main=bundles/main", "next=bundles/next"


def test_only_an_admin_sees_it_and_a_browser_may_give_the_key_as_a_password(
    bundles: tuple[str, ...], tmp_path: Path, ready: Callable[[TestClient], TestClient]
) -> None:
    (admin, one), (scorer, two) = new_key({"admin"}), new_key({"score"})
    KeyFile(keys=(one, two)).write(tmp_path / "keys.json")
    settings = Settings(model=bundles[:1], keys=tmp_path / "keys.json")
    with TestClient(create_app(settings)) as client:
        ready(client)
        told = client.get("/ui")
        assert told.status_code == 401 and told.headers["www-authenticate"].startswith('Basic realm="Sluice')
        assert [client.get("/ui", auth=("", key)).status_code for key in (admin, scorer, "no")] == [200, 403, 401]
        assert client.get("/ui", headers={"Authorization": f"Bearer {admin}"}).status_code == 200
        assert client.get("/ui", headers={"Authorization": "Basic ***"}).status_code == 401
        # Browsers send a password along with whatever another page makes them ask for: it opens this page alone.
        assert client.get("/v1/models", auth=("", admin)).status_code == 401
        page = client.get("/ui", auth=("", admin))
        assert "main" in page.text and "Experiments" not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert (
            page.headers["cache-control"] == "no-store" and "/ui" not in client.get("/openapi.json").json()["paths"]
        )


def test_it_tells_when_the_database_is_away(
    bundles: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ready: Callable[[TestClient], TestClient],
) -> None:
    settings = Settings(model=bundles[:1], events_url=f"sqlite:///{tmp_path}/e.db", events_spool=tmp_path / "spool")
    with TestClient(app := create_app(settings)) as client:

        def away() -> None:
            raise Unavailable("gone")

        monkeypatch.setattr(app.state.traffic.experiments, "refresh", away)
        page = ready(client).get("/ui")
        assert page.status_code == 200 and "the database can&#39;t be reached: gone" in page.text


def drawn(time: int, requests: int) -> list[Row]:
    """What random order left of some requests of either arm, and what the shadow arm did of both."""
    rows: list[Row] = []
    for arm in ("open", "gated"):
        for i in range(requests):
            name = f"{arm}-0-{i}"
            about = {"experiment": "home-gates", "unit": name, "time": time, "exposure_id": name, "shown": 20}
            rows.append((MATCHES, {**about, "arm": arm, "candidate": 0}))
            about |= {"arm": "deep", "exposure_id": f"deep-{name}"}
            rows += [(ASSIGNMENTS, {**about, "request_id": name}), (MATCHES, {**about, "candidate": 1})]
    return rows


def test_in_a_browser_on_a_desk_and_on_a_phone(
    browser: Browser,
    bundles: tuple[str, ...],
    tmp_path: Path,
    listening: Callable[..., Any],
    fill: Callable[[Database], Any],
) -> None:
    url = f"sqlite:///{tmp_path}/events.db"
    token, key = new_key({"admin"})
    KeyFile(keys=(key,)).write(tmp_path / "keys.json")
    settings = Settings(model=bundles, events_url=url, events_spool=tmp_path / "spool", keys=tmp_path / "keys.json")
    candidates = example_log(40, seed=5).select("item_id", "price", "tags").to_dicts()
    with listening(create_app(settings)) as port:
        address = f"127.0.0.1:{port}"
        with httpx.Client(base_url=f"http://{address}", headers={"X-API-Key": token}, trust_env=False) as client:
            assert client.post("/v1/experiments", json=EXPERIMENT).status_code == 201
            for i in range(40):
                body = {"user": {"user_id": i}, "context": {"hour": 9}, "candidates": candidates}
                assert client.post("/v1/score", json=body).status_code == 200
        database = Database(url)
        at = datetime.now(UTC)
        fill(database, "home-gates").traffic({"open": 0.11, "gated": 0.14}, 2000, at)
        database.insert(drawn(round(at.timestamp() * 1e6), 500))
        database.close()
        for name, width, height in (("desk", 1100, 800), ("phone", 390, 844)):
            browser.show(f"http://any:{token}@{address}/ui", width, height)
            assert browser.evaluate("document.title") == "Sluice: ready"
            assert browser.evaluate("document.querySelectorAll('section.experiment').length") == 1
            shown = browser.evaluate("document.body.innerText")
            assert all(
                text in shown for text in ("home-gates", "gated", "shadow", "better", "kept", "main", "next")
            )
            own = browser.evaluate("document.querySelector('table.own').innerText")
            assert len(re.findall(r"0\.1\d{3} \[0\.0\d{3}, 0\.\d{4}\]", own)) == 3, own
            assert browser.evaluate("document.querySelectorAll('svg rect').length") > 10
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("getComputedStyle(document.querySelector('section')).borderRadius") == "8px"
            small = (
                "[...document.querySelectorAll('td, p')].every(e => parseFloat(getComputedStyle(e).fontSize) >= 14)"
            )
            assert browser.evaluate(small)
            assert browser.picture(tmp_path / f"{name}.png").startswith(b"\x89PNG")
            told = [
                one for one in browser.happened if one["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
            ]
            assert told == []
            asked = [one for one in browser.happened if one["method"] == "Network.requestWillBeSent"]
            urls = {one["params"]["request"]["url"].replace(f"any:{token}@", "") for one in asked}
            assert urls <= {f"http://{address}/ui", "data:,"}
