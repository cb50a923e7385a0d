"""The one configuration of a run: ``ctr.yaml``, strict, with overrides from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from ctr_models.errors import ConfigError, SluiceError, explain
from ctr_models.model import ModelSpec
from pipelines.datasets.config import DataConfig
from pipelines.features.spec import FeatureSpec
from pipelines.training.config import RecipeConfig, TrainConfig
from pipelines.training.tracking import TrackingConfig

Model = Annotated[
    ModelSpec,
    BeforeValidator(ModelSpec.parse),
    PlainSerializer(lambda spec: spec.to_dict(), return_type=dict[str, Any]),
]


class RunConfig(BaseModel):
    """Everything that decides a run's outcome.

    Example:
        >>> config = RunConfig.model_validate({"name": "demo", "model": {"name": "gdcn"}})
        >>> config.data.source
        'click_world'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field("clicks", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the MLflow experiment and of the registered model."""
    workdir: Path = Path("runs")
    """Encoded features, checkpoints, bundles and, by default, the MLflow store."""
    seed: int = Field(2026, ge=0, lt=2**31)
    data: DataConfig = DataConfig()
    features: FeatureSpec | None = None
    """None: the source's published definition."""
    model: Model = ModelSpec(name="finalmlp")
    recipe: RecipeConfig = RecipeConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()

    def public(self) -> RunConfig:
        """Return the same without the password that the tracking URI may hold, for artefacts that others read."""
        from pipelines.release.store import shown

        uri = shown(self.tracking.uri) if self.tracking.uri is not None else None
        return self.model_copy(update={"tracking": self.tracking.model_copy(update={"uri": uri})})


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``ctr.yaml``, apply ``key.sub=value`` overrides, check every key.

    Args:
        path: the file; None starts from the defaults.
        overrides: values are YAML, for example ``train.epochs=3`` or ``model.gates.cross=none``.

    Raises:
        ConfigError: naming the file, the key, and the nearest valid one.
    """
    tree = {} if path is None else read_yaml(path, remedy="sluice init writes one")
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, str(path) if path else "command line")


def read_yaml(path: Path, *, remedy: str = "") -> dict[str, Any]:
    """Read a file of keys: 1e-3 is a number, a repeated key an error.

    Args:
        path: the file.
        remedy: for the message, if there is no such file.

    Raises:
        ConfigError: no file, no YAML, or no mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), remedy=remedy) from None
    except OSError as error:
        raise ConfigError(f"can't be read ({error.strerror})", where=str(path)) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none, or no UTF-8
        raise ConfigError(f"not valid YAML: {_yaml_problem(error)}", where=str(path)) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"expected keys, found {type(tree).__name__}", where=str(path))
    return tree


def parse_config(tree: dict[str, Any], source: str = "config") -> RunConfig:
    """Check a mapping as :func:`load_config` checks a file."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise explain(error, RunConfig, source) from None
    except SluiceError as error:
        where = f"{source}: {error.where}" if error.where else source
        raise ConfigError(error.problem, where=where, remedy=error.remedy) from None


def dump_config(config: RunConfig) -> str:
    """Return the YAML that reads back as ``config``."""
    return yaml.safe_dump(plain_config(config), sort_keys=False)


def plain_config(config: RunConfig) -> dict[str, Any]:
    """Return every setting as plain values; null stands only where it is not the default anyway."""
    written = json.loads(config.model_dump_json(exclude_defaults=True))
    return _without_nulls(json.loads(config.model_dump_json()), written)


def _without_nulls(value: Any, written: Any) -> Any:
    if isinstance(value, dict):
        own = written if isinstance(written, dict) else {}
        return {k: _without_nulls(v, own.get(k)) for k, v in value.items() if v is not None or k in own}
    if isinstance(value, list):
        items = written if isinstance(written, list) else [None] * len(value)
        return [_without_nulls(v, w) for v, w in zip(value, items, strict=True)]
    return value


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``key.sub=value`` in a tree of keys; the value is YAML.

    Example:
        >>> tree = {"model": {"name": "gdcn"}}
        >>> apply_override(tree, "model.gates.cross=none")
        >>> tree
        {'model': {'name': 'gdcn', 'gates': {'cross': 'none'}}}
    """
    key, sign, text = override.partition("=")
    where = f"override {override!r}"
    if not sign or not key:
        raise ConfigError("an override is written key.sub=value", where=where)
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {_yaml_problem(error)}", where=where) from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        index = _index(node, part, where)
        inner = node[index] if isinstance(node, list) else node.get(index)
        if isinstance(inner, str):
            inner = {"name": inner}  # `model: gdcn` is short for `model: {name: gdcn}`
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict | list):
            raise ConfigError(f"{part!r} holds a value, not keys", where=where)
        node[index] = inner
        node = inner
    node[_index(node, last, where)] = value


def _index(node: Any, part: str, where: str) -> Any:
    if not isinstance(node, list):
        return part
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise ConfigError(f"{part!r} is no position in a list of {len(node)}", where=where, remedy="count from 0")


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text and lets a repeated key win silently; this one does neither."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key can't be a list", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*)?\.\d+|\d[\d_]*\.?)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|nan)$",
        re.IGNORECASE,
    ),
    list("-+0123456789."),
)
