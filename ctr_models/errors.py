"""The errors a user of Sluice may meet. Each says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

MOST = 30
"""Words that a remedy lists."""


class SluiceError(Exception):
    """Something the user can put right.

    Args:
        problem: what is wrong, with the offending value.
        where: file, field, column or row, from the outside in, for example ``ctr.yaml: train.epochs``.
        remedy: what to do about it.

    Example:
        >>> print(SluiceError("label is 2", where="clicks.parquet: column click, row 7", remedy="use 0 or 1"))
        clicks.parquet: column click, row 7: label is 2. use 0 or 1.
    """

    def __init__(self, problem: str, *, where: str = "", remedy: str = "") -> None:
        self.problem, self.where, self.remedy = problem, where, remedy
        text = f"{where}: {problem}" if where else problem
        super().__init__(f"{text.rstrip('.')}. {remedy.rstrip('.')}." if remedy else text)


class ConfigError(SluiceError):
    """A configuration file, an override, or an argument of a constructor is wrong."""


class DataError(SluiceError):
    """Raw or encoded data don't hold what the FeatureSpec promises."""


class ArtifactError(SluiceError):
    """A FeatureState, checkpoint or Bundle is damaged, incomplete or of another version."""


class RequestError(SluiceError):
    """A scoring request can't be encoded. ``where`` is the path of the field in the request."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a remedy that names the nearest known word, and those that are known; of very many, the near ones.

    Of a word only the first 100 characters are compared: some come from strangers, and a long one takes long.

    Example:
        >>> nearest("epoch", ["epochs", "seed"])
        "did you mean 'epochs'? known: 'epochs', 'seed'"
    """
    known = sorted(known)
    if not known:
        return "none is known"
    close = difflib.get_close_matches(word[:100], known, n=8, cutoff=0.6)
    shown = known if len(known) <= MOST else sorted(close) or known[:8]
    listed = "known: " + ", ".join(repr(k) for k in shown)
    if len(shown) < len(known):
        listed += f" and {len(known) - len(shown)} more"
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def explain(
    error: ValidationError,
    model: type[BaseModel],
    source: str = "",
    *,
    under: str = "",
    beside: Sequence[str] = (),
) -> ConfigError:
    """Turn pydantic's complaints into one line that names file, key and remedy.

    Args:
        error: what pydantic raised.
        model: the model that was validated; unknown keys are compared with its fields.
        source: the file or object, as the user knows it.
        under: the key below which the model stands, for example ``data.options``.
        beside: keys that may stand beside the model's own fields.
    """
    complaints = error.errors(include_url=False)
    # A misspelt key also leaves the right one missing: the misspelling is what to report.
    first = next((c for c in complaints if c["type"] == "extra_forbidden"), complaints[0])
    shown, models = _walk(model, first["loc"])
    context, given = first.get("ctx", {}), first["input"]
    if first["type"].startswith("union_tag"):
        shown.append(context["discriminator"].strip("'"))
    problem, remedy = _plain(first["type"], context, given, first["msg"])
    if first["type"] == "extra_forbidden":
        known = [*_names(models), *(beside if len(first["loc"]) == 1 else ())]
        problem, remedy = "unknown key", nearest(str(first["loc"][-1]), sorted(known))
    path = ".".join((*((under,) if under else ()), *shown))
    return ConfigError(problem, where=": ".join(part for part in (source, path) if part), remedy=remedy)


def _plain(kind: str, context: dict[str, Any], given: Any, message: str) -> tuple[str, str]:
    """Say what pydantic means, and the remedy."""
    got = repr(given)
    got = got if len(got) <= 80 else got[:77] + "..."
    if kind in ("missing", "union_tag_not_found"):
        return "required key is missing", "add it"
    if kind == "json_invalid":
        return f"not valid JSON: {context['error']}", ""
    if kind == "value_error":
        return message.removeprefix("Value error, "), ""
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        known = re.findall(r"'([^']*)'", context.get("expected") or context["expected_tags"])
        value = context.get("tag", given)
        return f"unknown value {value!r}", nearest(str(value), known)
    if kind in _BOUNDS:
        return f"must be {_BOUNDS[kind]} {next(iter(context.values())):g}, got {got}", ""
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, got {got}", ""
    if kind == "too_short":
        return f"must hold at least {context['min_length']}, got {got}", ""
    for prefix, expected in _EXPECTED.items():
        if kind.startswith(prefix):
            return f"expected {expected}, got {got}", ""
    return f"{message[:1].lower()}{message[1:]}, got {got}", ""


_BOUNDS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}
_EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "bool_": "true or false",
    "string_type": "text",
    "path_": "a path",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys",
    "model_": "keys",
}


def _walk(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """Follow pydantic's location.

    Returns:
        the path as it stands in the file (without the tags of unions, which are no keys), and the models that
        may stand where the location's last part was looked up.
    """
    shown: list[str] = []
    here: list[Any] = [model]
    models: list[type[BaseModel]] = []
    for part in location:
        models = [inner for one in here for inner in _models_in(one)]
        fields = [m.model_fields[str(part)].annotation for m in models if str(part) in m.model_fields]
        tagged = [m for m in models if part in (m.__name__, _tag_of(m))]
        if fields:
            here = fields
        elif tagged:
            here = tagged
            continue
        shown.append(str(part))
    return shown, models


def _names(models: list[type[BaseModel]]) -> list[str]:
    return sorted({name for m in models for name in m.model_fields})


def _tag_of(model: type[BaseModel]) -> Any:
    """The value of a discriminated model's single-literal field (``kind``, ``how``, ``name``), if it has one."""
    for name in ("kind", "how", "name"):
        field = model.model_fields.get(name)
        args: tuple[Any, ...] = getattr(field.annotation, "__args__", ()) if field else ()
        if len(args) == 1 and isinstance(args[0], str):
            return args[0]
    return None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]
