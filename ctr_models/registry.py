"""Names for parts: a decorator registers, a name, an entry point or a dotted path finds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from ctr_models.errors import ConfigError, nearest

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Maps names to classes.

    Args:
        what: what the classes are, in the singular, for messages.
        group: the entry-point group by which other distributions bring theirs.
        base: what a class found by its dotted path must derive from.

    Example:
        >>> shapes = Registry("shape", group="sluice.shapes")
        >>> @shapes.register("square")
        ... class Square: ...
        >>> shapes["square"].__name__
        'Square'
        >>> shapes["sqare"]
        Traceback (most recent call last):
            ...
        ctr_models.errors.ConfigError: unknown shape 'sqare'. did you mean 'square'? known: 'square'.
    """

    def __init__(self, what: str, *, group: str, base: type = object) -> None:
        self.what, self.group, self.base = what, group, base
        self._classes: dict[str, T] = {}
        self._gathered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a class decorator that registers under ``name`` and sets the class's ``name``."""

        def decorate(cls: T) -> T:
            taken = self._classes.get(name)
            if taken is not None and _origin(taken) != _origin(cls):  # a file that is read anew may say it again
                raise ConfigError(
                    f"{self.what} {name!r} is registered twice, by {_path(taken)} and {_path(cls)}",
                    remedy="choose another name",
                )
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return decorate

    def __getitem__(self, name: str) -> T:
        self._gather()
        if name not in self._classes and "." in name:
            return self._import(name)
        try:
            return self._classes[name]
        except KeyError:
            raise ConfigError(f"unknown {self.what} {name!r}", remedy=nearest(name, self._classes)) from None

    def __iter__(self) -> Iterator[str]:
        self._gather()
        return iter(sorted(self._classes))

    def __contains__(self, name: str) -> bool:
        self._gather()
        return name in self._classes

    def _gather(self) -> None:
        if not self._gathered:
            self._gathered = True
            for point in entry_points(group=self.group):
                point.load()  # importing runs the decorators

    def _import(self, path: str) -> T:
        module, _, attribute = path.replace(":", ".").rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: no such path at all
            raise ConfigError(
                f"can't import {self.what} {path!r} ({error})",
                remedy="give a registered name or the dotted path of an importable class",
            ) from None
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ConfigError(f"{path!r} is no {self.what}", remedy=f"derive a class from {self.base.__name__}")
        return found  # type: ignore[return-value]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _origin(cls: type) -> tuple[str, str]:
    """Return the file and the name of a class: a file may be imported under several names."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return file or cls.__module__, cls.__qualname__
