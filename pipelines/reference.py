"""The configuration described from its own models: a JSON schema for editors and a page for readers."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ctr_models.gates.base import GATES
from ctr_models.model import MODELS
from pipelines.config import RunConfig
from pipelines.datasets.base import DATASETS
from pipelines.training.recipes import RECIPES

Json = dict[str, Any]

_DOTTED = {"type": "string", "pattern": r"\."}
"""The dotted path of a class of the user's own."""

_HEAD = """# Configuration

One file, `ctr.yaml`, decides a run. `sluice init` writes one from a look at your data, `sluice config check -c
ctr.yaml` checks one, and any key can be set on the command line: `-o train.epochs=3`. A key that is not listed
here is refused, with the nearest one that is.

For completion and checks while you type, write the JSON schema beside the file, and name it in the first line:

```bash
sluice config schema > ctr.schema.json
```

```yaml
# yaml-language-server: $schema=ctr.schema.json
name: clicks
```

This page is written by `sluice config reference` (`make docs`), from the models that check the file.
"""


def json_schema() -> Json:
    """Return the JSON schema of ``ctr.yaml``: every key, with the registered models, gates and sources.

    Example:
        >>> json_schema()["properties"]["seed"]["minimum"]
        0
    """
    schema = _described(RunConfig)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Sluice run"
    definitions = schema["$defs"]
    definitions["gate"] = _by_name({name: _described(GATES[name].Config) for name in GATES}, definitions)
    models = {}
    for name in MODELS:
        models[name] = _described(MODELS[name].Config)
        models[name].setdefault("properties", {})["gates"] = {
            "type": "object",
            "description": "The gate in each slot.",
            "additionalProperties": False,
            "properties": {slot: {"$ref": "#/$defs/gate"} for slot in MODELS[name].slots()},
        }
    schema["properties"]["model"] = {
        **_by_name(models, definitions),
        "description": "A model by name, its options, and the gate in each of its slots.",
    }
    data = definitions["DataConfig"]
    data["properties"]["source"]["anyOf"] = [{"enum": list(DATASETS)}, dict(_DOTTED)]
    data["allOf"] = [
        {
            "if": {"required": ["source"], "properties": {"source": {"const": name}}},
            "then": {"properties": {"options": _merged(_described(DATASETS[name].Options), definitions)}},
        }
        for name in DATASETS
    ]
    definitions["RecipeConfig"]["properties"]["name"]["anyOf"] = [{"enum": list(RECIPES)}, dict(_DOTTED)]
    for unused in ("ModelSpec", "GateSpec"):
        definitions.pop(unused, None)
    return schema


def reference() -> str:
    """Return the page of all settings, as Markdown.

    Example:
        >>> "| `seed` | integer >= 0, < 2147483648 | `2026` |" in reference()
        True
    """
    schema = _described(RunConfig)
    definitions = schema["$defs"]
    parts = [_HEAD, "## Top level\n", _table(schema, definitions)]
    for path, name in _sections(schema, definitions):
        section = definitions[name]
        parts.append(f"## `{path}`\n")
        parts.append(f"{_paragraph(section)}\n")
        parts.append(_table(section, definitions))
        if path == "data":
            parts.extend(_registered("source", "data.options", {name: DATASETS[name] for name in DATASETS}))
        if path == "recipe":
            parts.extend(_registered("recipe", "recipe.options", {name: RECIPES[name] for name in RECIPES}))
    parts.append("## `model`\n")
    parts.append(
        "A name, or `{name: ..., gates: {slot: gate}, option: value}`. A dotted path names a class of your own.\n\n"
        "Besides the slots named below every model has slot `selection`, empty unless it is filled.\n"
    )
    for name in MODELS:
        model = MODELS[name]
        slots = ", ".join(f"`{slot}` (default `{gate}`)" for slot, gate in model.default_gates.items()) or "none"
        parts.append(f"### model `{name}`\n")
        parts.append(f"{_first(model)}{_source(model.source)} Gate slots: {slots}.\n")
        parts.append(_table(*_apart(_described(model.Config))))
    parts.append("## `model.gates`\n")
    parts.append("A name, or `{name: ..., option: value}`, by slot.\n")
    for name in GATES:
        gate = GATES[name]
        slots = ", ".join(f"`{slot}`" for slot in sorted(gate.slots))
        parts.append(f"### gate `{name}`\n")
        parts.append(f"{_first(gate)}{_source(gate.source)} Fits slots: {slots}.\n")
        parts.append(_table(*_apart(_described(gate.Config))))
    return "\n".join(parts).rstrip() + "\n"


def table(model: type[BaseModel], prefix: str) -> str:
    """Return the fields of a model that is set in the environment, as a Markdown table.

    Args:
        model: each field is followed by its documentation, as a string.
        prefix: of the variables.

    Example:
        >>> from pipelines.training.tracking import TrackingConfig
        >>> table(TrackingConfig, "TRACKING_").splitlines()[2]
        '| `TRACKING_ENABLED` | `true`, `false` | `true` |  |'
    """
    schema, definitions = _apart(_described(model))
    variables = {prefix + key.upper(): field for key, field in schema["properties"].items()}
    required = [prefix + key.upper() for key in schema.get("required", ())]
    return _table({"properties": variables, "required": required}, definitions)


def _registered(what: str, path: str, classes: Mapping[str, Any]) -> Iterator[str]:
    """What each registered class is, and the options that it takes under ``path``."""
    for name, cls in classes.items():
        yield f"### {what} `{name}`\n"
        schema, definitions = _apart(_described(cls.Options))
        options = f" Its `{path}`:" if schema.get("properties") else ""
        yield f"{_first(cls)}{options}\n"
        if options:
            yield _table(schema, definitions)


def _sections(schema: Json, definitions: Json, above: str = "") -> Iterator[tuple[str, str]]:
    """Every nested model below ``schema``, with its path in the file, in the order of the file."""
    for key, field in schema.get("properties", {}).items():
        if not above and key == "model":
            continue
        for name, suffix in _refs(field):
            path = f"{above}{key}{suffix}"
            tag = _tag(definitions[name])
            yield (f"{path}: {{{tag}}}" if tag else path), name
            yield from _sections(definitions[name], definitions, f"{path}.")


def _refs(field: Json, suffix: str = "") -> Iterator[tuple[str, str]]:
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2], suffix
    for one in (*field.get("anyOf", ()), *field.get("oneOf", ()), *field.get("allOf", ())):
        yield from _refs(one, suffix)
    if isinstance(field.get("items"), dict):
        yield from _refs(field["items"], "[]")


def _tag(definition: Json) -> str:
    """``how: hash`` for a model that is chosen by the value of one of its keys."""
    for key, field in definition.get("properties", {}).items():
        if "const" in field:
            return f"{key}: {field['const']}"
    return ""


def _table(schema: Json, definitions: Json) -> str:
    fields = {k: f for k, f in schema.get("properties", {}).items() if "const" not in f}
    if not fields:
        return "No options.\n"
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, field in fields.items():
        value = _kind(field, definitions).replace("|", "\\|")
        text = " ".join(field.get("description", "").replace("``", "`").split()).replace("|", "\\|")
        if key in schema.get("required", ()):
            default = "required"
        elif field.get("default") is None:
            default = ""
        elif next(_refs(field), None) and isinstance(field["default"], dict):
            default = "see there"
        else:
            default = f"`{json.dumps(field['default'], ensure_ascii=False)}`".replace('`"', "`").replace('"`', "`")
        rows.append(f"| `{key}` | {value} | {default} | {text} |")
    return "\n".join(rows) + "\n"


def _kind(field: Json, definitions: Json) -> str:
    """Say in words what values a JSON schema allows."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        tag = _tag(definitions.get(name, {}))
        return f"`{{{tag}}}`" if tag else "keys below"
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    branches = [*field.get("anyOf", ()), *field.get("oneOf", ()), *field.get("allOf", ())]
    if branches:
        words = [_kind(one, definitions) for one in branches if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}), definitions)}"
    if field.get("type") == "object":
        inner = field.get("additionalProperties")
        return f"name: {_kind(inner, definitions)}" if isinstance(inner, dict) else "keys"
    word = {"boolean": "`true`, `false`", "string": "text", None: "anything"}.get(
        field.get("type"), field.get("type")
    )
    if field.get("format") == "path":
        word = "path"
    elif "format" in field:
        word = field["format"]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {field[key]:g}" if field[key] < 1e6 else f"{sign} {field[key]}"
        for key, sign in signs.items()
        if key in field
    ]
    return f"{word} {', '.join(bounds)}".strip()


def _described(model: type[BaseModel]) -> Json:
    """The model's JSON schema, with the text that stands below each field in the source."""
    schema = model.model_json_schema()
    classes = {one.__name__: one for one in (model, *_nested(model))}
    for name, part in ((model.__name__, schema), *schema.get("$defs", {}).items()):
        cls = classes.get(name)
        if cls is None:
            continue
        if cls.__doc__:
            part["description"] = inspect.cleandoc(cls.__doc__).split("\n\nExample:")[0]
        texts = _field_texts(cls)
        for key, field in part.get("properties", {}).items():
            field.pop("title", None)
            if key in texts:
                field["description"] = texts[key]
    return schema


def _nested(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for field in model.model_fields.values():
        for inner in _classes(field.annotation):
            yield inner
            yield from _nested(inner)


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _classes(argument)


def _field_texts(model: type[BaseModel]) -> dict[str, str]:
    """The string literal below each annotated field, base classes included."""
    texts: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                texts[field.target.id] = inspect.cleandoc(below.value.value)
    return texts


def _by_name(configs: Mapping[str, Json], definitions: Json) -> Json:
    """A name alone, or a mapping with ``name`` and that one's own options; or a dotted path of the user's."""
    branches: list[Json] = [{"enum": list(configs)}]
    for name, config in configs.items():
        own = _merged(config, definitions)
        own["properties"] = {"name": {"const": name}, **own.get("properties", {})}
        own["required"] = ["name", *own.get("required", ())]
        branches.append(own)
    branches += [dict(_DOTTED), {"type": "object", "required": ["name"], "properties": {"name": dict(_DOTTED)}}]
    return {"anyOf": branches}


def _merged(schema: Json, definitions: Json) -> Json:
    """Move a schema's own definitions into the whole's."""
    own, inner = _apart(schema)
    definitions.update(inner)
    return own


def _apart(schema: Json) -> tuple[Json, Json]:
    return {k: v for k, v in schema.items() if k != "$defs"}, schema.get("$defs", {})


def _paragraph(schema: Json) -> str:
    return schema.get("description", "").replace("``", "`")


def _first(cls: type) -> str:
    """The first sentence or paragraph of a class's documentation, on one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")


def _source(source: str) -> str:
    return f" Source: {source}." if source else ""
