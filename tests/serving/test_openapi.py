"""The description tells of every status, and all that it refers to is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from serving.app import create_app
from serving.openapi import ALWAYS, GUARDED, WITH_BODY
from serving.security import OPEN
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
