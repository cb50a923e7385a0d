"""Whatever can be made of the OpenAPI document, and whatever breaks it, is answered with a status that it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.limits import ARROW
from serving.settings import Settings

MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


@schemathesis.serializer(ARROW)
def as_bytes(context: Any, value: Any) -> bytes:
    """Arrow streams are bytes; those made here are none."""
    return value if isinstance(value, bytes) else str(value).encode()


@pytest.fixture(scope="module")
def api(listening, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("api")
    example_bundle(folder / "bundle")
    options = Settings(
        model=(str(folder / "bundle"),), events_url=f"sqlite:///{folder}/events.db", events_spool=folder / "spool"
    )
    with listening(create_app(options)) as port:
        url = f"http://127.0.0.1:{port}"
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_no_case_breaks_the_server(api: Any, request: pytest.FixtureRequest) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    wanted = request.config.getoption("--schemathesis-cases")
    with_body = [operation for operation in operations if operation.body]
    each = -(-wanted // len(with_body))
    told: Counter[int] = Counter()
    session = requests.Session()
    session.trust_env = False

    for operation in operations:
        strategies = [operation.as_strategy(generation_mode=mode) for mode in MODES]

        @settings(
            max_examples=each if operation.body else min(each, 20),
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(st.one_of(strategies))
        def run(case: Any) -> None:
            response = case.call(session=session, timeout=30)
            status = response.status_code
            told[status] += 1
            # A case may set a deadline that nobody can keep; nothing else may fail on our side.
            late = status == 504 and "x-deadline-ms" in {name.lower() for name in case.headers or {}}
            assert status < 500 or late, response.text
            case.validate_response(response, checks=[status_code_conformance, response_schema_conformance])

        run()
    assert session.get(f"{api.get_base_url().rstrip('/')}/readyz").status_code == 200
    assert sum(told.values()) >= wanted * 0.9, told
    assert {200, 422} <= set(told)
