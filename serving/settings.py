"""What a deployment decides: which model, where, and how much is let in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ctr_models.errors import ConfigError, explain, nearest
from serving import EMBEDDED

PREFIX = "SLUICE_"
_OTLP = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own name for the endpoint."""
_SLOT = re.compile(r"(?P<slot>[\w.-]{1,64})=(?P<source>.+)")


def _listed(value: Any) -> Any:
    """Split a text at its commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _nothing(value: Any) -> Any:
    """Read the word ``none`` as nothing."""
    return None if value == "none" else value


def _name(source: str) -> str:
    """Return the name of a registered model, or of a folder."""
    if source.startswith("models:/"):
        return re.split("[@/]", source.removeprefix("models:/"))[0]
    return PurePath(os.path.abspath(source)).name


class Settings(BaseModel):
    """Settings of one server process. Each can be set in the environment as ``SLUICE_<NAME>``.

    Example:
        >>> settings = Settings.from_env({"SLUICE_MODEL": "models:/clicks@champion", "SLUICE_PORT": "9000"})
        >>> settings.port, settings.slots
        (9000, {'clicks': 'models:/clicks@champion'})
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(min_length=1)
    """What to serve: ``models:/name@alias``, ``models:/name/version`` or the path of a bundle. Several stand with
    commas between, each as ``slot=model``; requests name the slot, and the first answers those that name none."""
    tracking_uri: str | None = None
    """Of the MLflow store; None is the one under ``runs``."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 takes any free port."""
    keys: Path | None = None
    """JSON file of the API keys, see ``sluice keys``; None lets everyone in."""
    max_candidates: int = Field(2000, ge=1)
    """Of one request."""
    max_batch_requests: int = Field(256, ge=1)
    """Of one batch."""
    max_batch_candidates: int = Field(16_384, ge=1)
    """Of all requests of one batch together."""
    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    """Of one request."""
    held_bytes: int = Field(2**28, ge=2**16)
    """Of the bodies of all requests in hand; requests beyond get 503."""
    receive_seconds: float = Field(10.0, gt=0)
    """That the head of a request may take to arrive, then its body, and a client to read its answer."""
    max_connections: int = Field(1000, ge=1)
    """Of a process; those beyond are closed at once."""
    poll_seconds: float = Field(10.0, ge=0)
    """How often aliases and folders are looked at for a new bundle; 0 never."""
    features: str | None = None
    """The online feature store that ``sluice materialize`` fills: the folder of a snapshot, or ``redis://``,
    ``rediss://`` or ``unix://``. None: requests bring all features themselves."""
    features_timeout_ms: float = Field(100.0, gt=0)
    """Milliseconds that Redis may take to answer; a request goes on without stored features then."""
    events_url: Annotated[str | None, BeforeValidator(_nothing)] = None
    """Database of exposures, events and experiments: ``sqlite:///file.db`` or ``postgresql://``. None (``none`` in
    the environment): none are kept. An environment without it means ``sqlite:///runs/events.db``."""
    events_spool: Path = Path("runs/spool")
    """Folder for what the database can't take at the moment."""
    events_spool_bytes: int = Field(2**28, ge=2**16)
    """Most that a process may put there; beyond that events and requests are refused."""
    exposures: Literal["before", "with"] = "before"
    """Exposures are durable before a request is answered, or written with the answer, which does not wait."""
    experiments_seconds: float = Field(5.0, gt=0)
    """How often experiments are looked at that other processes stored."""
    guardrail_seconds: float = Field(60.0, ge=0)
    """How often the guardrails of running experiments are checked; 0 never. What takes long is done more seldom."""
    workers: int = Field(1, ge=1, le=64)
    """Processes that share the port. Limits hold for each; rates of keys are counted by all together."""
    hung_seconds: float = Field(30.0, ge=2)
    """How long one of several workers that was ready may do nothing at all before it is killed and replaced: it is
    stopped, or its event loop stands still. A busy one tells every second that it lives."""
    threads: int = Field(1, ge=1, le=256)
    """Of a worker, that compute forward passes, one core each, beside the one that reads, encodes and answers."""
    int8: bool = False
    """Layers that a bundle names are computed in eight bits where that is faster: scores change by 1e-3 at most."""
    batch_rows: int = Field(2048, ge=1)
    """Candidates of concurrent requests that may share a forward pass; a single request may have more."""
    batch_ms: float = Field(10.0, ge=0)
    """Milliseconds that a shared pass may be expected to take; a single request may take longer."""
    inline_ms: float = Field(1.0, ge=0)
    """A pass expected to take fewer milliseconds is computed where requests are read, without a thread."""
    busy_poll_ms: float = Field(0.0, ge=0, le=100)
    """Milliseconds for which a worker stays awake for the next request, if the one before came as soon: a core that
    has slept is slow when it wakes. For workers that have a core each; what measures their use of it sees them busy
    though they wait. 0: they sleep at once."""
    queue_rows: int = Field(32_768, ge=1)
    """Candidates that may wait for a pass; requests beyond get 503 at once."""
    queue_ms: float = Field(50.0, gt=0)
    """Milliseconds that a request may be expected to wait; requests beyond get 503 at once."""
    max_requests: int = Field(512, ge=1)
    """Requests in hand at once, waiting ones included; those beyond get 503 before they are read."""
    grace_seconds: float = Field(10.0, ge=0)
    """How long requests in flight may take to end once the server is told to stop."""
    drain_seconds: float = Field(0.0, ge=0)
    """How long a server that got SIGTERM goes on at least, refusing what is new, so that load balancers notice."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """One JSON object a line, or text; ``auto`` is text on a terminal."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is told; the lines of requests are ``info``."""
    log_requests: float = Field(1.0, ge=0, le=1)
    """Share of requests that get a line, chosen by their ids; those that failed inside always get one."""
    otlp_endpoint: str | None = None
    """Of an OpenTelemetry collector (OTLP over HTTP, ``http://localhost:4318``); ``OTEL_EXPORTER_OTLP_ENDPOINT``
    says it too. None: no traces."""
    trace_share: float = Field(1.0, ge=0, le=1)
    """Share of traces that begin here; a request that continues one is recorded as its ``traceparent`` says."""
    parent: int | None = Field(None, ge=1)
    """A process to end with, however that ends; whoever starts a server for itself gives its own id."""

    @property
    def slots(self) -> dict[str, str]:
        """What each slot serves; one that is not named is called like its model, or its folder."""
        found = {}
        for text in self.model:
            match = _SLOT.match(text)
            source = match["source"] if match else text
            found[match["slot"] if match else _name(source)] = source
        return found

    @model_validator(mode="after")
    def _distinct(self) -> Settings:
        if len(self.slots) < len(self.model):
            raise ValueError("two models have one slot's name; write slot=model")
        return self

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """Read the environment; what is given, and not None, wins. Who says nothing of events keeps them.

        Raises:
            ConfigError: naming the variable.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for variable, text in environment.items():
            if variable.startswith(PREFIX):
                name = variable.removeprefix(PREFIX).lower()
                if name not in cls.model_fields:
                    known = [PREFIX + field.upper() for field in cls.model_fields]
                    raise ConfigError("no such setting", where=variable, remedy=nearest(variable, known))
                values[name] = text
        if environment.get(_OTLP):
            values.setdefault("otlp_endpoint", environment[_OTLP])
        values |= {name: value for name, value in given.items() if value is not None}
        if not values.get("model"):
            raise ConfigError("no model to serve", remedy="give --model models:/name@champion, or set SLUICE_MODEL")
        values.setdefault("events_url", EMBEDDED)
        try:
            return cls(**values)
        except ValidationError as error:
            raise explain(error, cls, "server settings") from None
