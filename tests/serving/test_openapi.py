"""The description tells of every status, and all that it refers to is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.openapi import ALWAYS, GUARDED, WITH_BODY
from serving.security import OPEN, KeyFile
from serving.settings import Settings


def test_every_status_is_told(tmp_path: Path) -> None:
    settings = Settings(
        model=(str(tmp_path),), events_url=f"sqlite:///{tmp_path}/e.db", events_spool=tmp_path / "s"
    )
    described = create_app(settings).openapi()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            told = set(map(int, operation["responses"]))
            assert told >= set(ALWAYS), path
            assert (path in OPEN) or told >= set(GUARDED), path
            assert method != "post" or told >= set(WITH_BODY), path
    text = json.dumps(described)
    for name in set(re.findall(r'"#/components/schemas/(\w+)"', text)):
        assert name in described["components"]["schemas"]


@pytest.mark.parametrize("guarded", [False, True])
def test_rows_of_the_data_are_shown_to_nobody_without_a_key(guarded: bool, ready, tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    KeyFile().write(tmp_path / "keys.json")
    keys = tmp_path / "keys.json" if guarded else None
    with TestClient(create_app(Settings(model=(str(bundle.directory),), keys=keys))) as client:
        text = ready(client).get("/openapi.json").text
    told = json.loads(text)["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]
    assert ("example" in told) is not guarded
    values = [v for v in bundle.golden["item_id"].to_list() if v]
    assert any(value in text for value in values) is not guarded
    assert "item_id" in text
