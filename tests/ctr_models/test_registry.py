from __future__ import annotations

import sys
from types import ModuleType

import pytest

from ctr_models.errors import ConfigError
from ctr_models.registry import Registry


def test_names_come_sorted_and_are_set_on_the_class() -> None:
    things: Registry[type] = Registry("thing", group="sluice.nothing")

    @things.register("b")
    class B: ...

    @things.register("a")
    class A: ...

    assert list(things) == ["a", "b"]
    assert things["a"] is A
    assert B.name == "b"  # type: ignore[attr-defined]
    assert "a" in things
    assert "c" not in things


def test_a_name_taken_is_refused() -> None:
    things: Registry[type] = Registry("thing", group="sluice.nothing")
    things.register("a")(type("First", (), {}))
    with pytest.raises(ConfigError, match="thing 'a' is registered twice"):
        things.register("a")(type("Second", (), {}))


def test_a_class_of_the_same_name_elsewhere_takes_no_name_away() -> None:
    things: Registry[type] = Registry("thing", group="sluice.nothing")
    first, second = (type("Thing", (), {"__module__": module}) for module in ("here", "there"))
    things.register("a")(first)
    with pytest.raises(ConfigError, match=r"registered twice, by here.Thing and there.Thing. choose another name"):
        things.register("a")(second)
    assert things["a"] is first
    again = type("Thing", (), {"__module__": "here"})
    assert things.register("a")(again) is things["a"] is again


def test_a_file_may_be_imported_under_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    things: Registry[type] = Registry("thing", group="sluice.nothing")
    for module in ("by_name", "by_path"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        sys.modules[module].__file__ = "/somewhere/mine.py"
        things.register("a")(type("Thing", (), {"__module__": module}))
    assert things["a"].__module__ == "by_path"


@pytest.mark.parametrize("path", ["no.such.module", "ctr_models.schema.Schemer"])
def test_a_path_that_leads_nowhere_is_explained(path: str) -> None:
    with pytest.raises(ConfigError, match=f"can't import thing '{path}'"):
        Registry("thing", group="sluice.nothing")[path]
