"""The errors a user of Sluice may meet. Each says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError


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
    """Return a remedy that names the nearest known word, or all of them when none is near.

    Example:
        >>> nearest("epoch", ["epochs", "seed"])
        "did you mean 'epochs'? known: 'epochs', 'seed'"
    """
    known = sorted(known)
    listed = "known: " + ", ".join(repr(k) for k in known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def explain(error: ValidationError, model: type[BaseModel], source: str) -> ConfigError:
    """Turn pydantic's first complaint into one line that names file, key and remedy.

    Args:
        error: what pydantic raised.
        model: the model that was validated; unknown keys are compared with its fields.
        source: the file or object, as the user knows it.
    """
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    where = f"{source}: {path}" if path else source
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        return ConfigError("unknown key", where=where, remedy=nearest(str(first["loc"][-1]), known))
    if first["type"] == "missing":
        return ConfigError("required key is missing", where=where, remedy="add it")
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    reason = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{reason} (got {shown})", where=where)


def _fields_at(model: Any, path: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the model that stands at ``path`` below ``model``."""
    candidates = [model]
    for part in path:
        below: list[Any] = []
        for one in candidates:
            for inner in _models_in(one):
                if part in inner.model_fields:
                    below.append(inner.model_fields[part].annotation)
                elif inner.__name__ == part or isinstance(part, int) or _tag_of(inner) == part:
                    below.append(inner)
            if not _models_in(one):
                below.append(one)
        candidates = below or candidates
    return sorted({name for one in candidates for inner in _models_in(one) for name in inner.model_fields})


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
