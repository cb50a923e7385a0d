from __future__ import annotations

import re
from typing import Any

import polars as pl
import pytest

from ctr_models.errors import ConfigError
from pipelines.experiments.matrix_report import BEGIN, END, forest, gains, render_page, verdicts, write_markdown

GIVEN: dict[str, Any] = {"notes": ["Three seeds."], "about": {"gdcn": "small rows", "din": "few rows"}}


def row(model: str, slot: str, gate: str, value: float | None, **changed: Any) -> dict[str, Any]:
    """A cell's summary; a value that its interval of half a thousandth does not hold is no noise."""
    compared: dict[str, Any] = {}
    for metric, sign in (("auc", 1), ("logloss", -1)):
        own = None if value is None else sign * value
        kind = None if value is None else "noise" if abs(value) < 5e-4 else "better" if value > 0 else "worse"
        low, high = (None, None) if own is None else (own - 5e-4, own + 5e-4)
        compared |= {f"{metric}_value": own, f"{metric}_low": low, f"{metric}_high": high}
        compared |= {f"{metric}_p": None if own is None else 0.01, f"{metric}_verdict": kind}
    costs = {"parameters": 1234, "flops_per_row": 100.0, "rows_per_second": 5e4, "milliseconds": 2.0}
    return {
        **{"model": model, "slot": slot, "gate": gate, "control": "none", "error": None, "chosen": False},
        **{"trained": 3, "seeds": 3, "test_auc": 0.9 + (value or 0), "test_auc_sd": 1e-4, "test_logloss": 0.3},
        **{"valid_auc": 0.91, "gate_mean": 0.5, "gate_std": 0.1, "gate_saturation": 0.0, "gate_entropy": 1.0},
        **compared,
        **costs,
        **{f"{name}_ratio": 1.0 if gate == "none" else 1.5 for name in costs},
        **changed,
    }


def failed(*place: str, error: str) -> dict[str, Any]:
    keep = ("model", "slot", "gate", "control", "seeds", "chosen")
    plain = row(*place, None)
    return {key: plain[key] if key in keep else None for key in plain} | {"trained": 0, "error": error}


@pytest.fixture
def table() -> pl.DataFrame:
    rows = [
        row("gdcn", "field", "none", None),
        row("gdcn", "field", "mixer", 0.002, chosen=True),
        row("gdcn", "field", "gumbel", -0.5),
        row("gdcn", "cross", "none", None),
        row("gdcn", "cross", "sigmoid", 0.0001),
        failed("gdcn", "cross", "recursive", error="ConfigError: a | b <c>"),
        row("din", "sequence", "none", None),
        row("din", "sequence", "recency", -0.001),
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def test_verdicts_name_what_is_better_and_worse_and_what_valid_would_choose(table):
    found = verdicts(table.filter(model="gdcn"))
    assert found == {
        "name": "gdcn",
        "cells": 6,
        "better": ["field: mixer"],
        "worse": ["field: gumbel"],
        "noise": 1,
        "chosen": "field: mixer (+0.00200)",
    }
    assert verdicts(table.filter(model="din"))["chosen"] == ""


def test_the_page_tells_of_every_cell_and_asks_for_nothing_from_elsewhere(table):
    page = render_page(table, **GIVEN)
    for told in ("Three seeds.", "small rows", "few rows", "+0.00200", "recency", "1,234"):
        assert told in page
    assert "failed: ConfigError: a | b &lt;c&gt;" in page
    assert page.count("<svg") == 3  # a forest for each model, gain against cost
    assert not re.search(r'(src|href)="(?!#)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_matrix_that_has_just_begun_has_a_page(table):
    begun = table.filter(pl.col("gate") == "none")
    page = render_page(begun, **GIVEN)
    assert "<svg" not in page
    unfinished = table.with_columns(
        *(pl.lit(None).alias(c) for c in table.columns if c.startswith(("auc", "logl")))
    )
    assert "3 of 3 seeds trained" in render_page(unfinished, **GIVEN)


def test_a_forest_has_a_line_for_each_comparison_the_best_of_a_slot_on_top(table):
    figure = forest(table.filter(model="gdcn"))
    auc, logloss = figure.axes
    assert [t.get_text() for t in auc.get_yticklabels()] == [
        *("field, beside none", "mixer", "gumbel", "cross, beside none", "sigmoid")
    ]
    assert (auc.get_title(), logloss.get_title()) == ("AUC, more is better", "Logloss, less is better")


def test_one_failure_does_not_hide_the_other_gates(table):
    auc, _ = forest(table.filter(model="gdcn").filter(pl.col("gate") != "recursive")).axes
    many = pl.concat(
        [table.filter(model="gdcn", gate="sigmoid").with_columns(gate=pl.lit(f"g{i}")) for i in range(9)]
    )
    crowded, _ = forest(pl.concat([table.filter(gate="gumbel"), many])).axes
    assert auc.get_xlim()[1] > 0.5
    assert crowded.get_xlim()[1] < 0.002
    assert [t.get_text() for t in crowded.texts] == ["−0.5000"]


def test_gains_have_a_panel_for_each_model(table):
    figure = gains(table)
    assert [a.get_title() for a in figure.axes if a.get_visible()] == ["gdcn", "din"]
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"field", "cross", "sequence"}


def test_markdown_keeps_what_is_around_its_marks_and_is_the_same_twice(table, tmp_path):
    page = tmp_path / "docs" / "gates.md"
    page.parent.mkdir()
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter\n")
    written = write_markdown(page, table, **GIVEN)
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}")
    assert text.endswith(f"{END}\n\nAfter\n")
    assert "old" not in text
    assert "| field | `mixer` \\* | 0.90200 |" in text
    assert "**better**" in text
    assert "failed: ConfigError: a \\| b <c>" in text
    assert [p.name for p in written] == [
        *("gates.md", "gate-matrix-gdcn.svg", "gate-matrix-din.svg", "gate-matrix-gains.svg")
    ]
    assert {path for path in re.findall(r"\]\((images/[^)]+)\)", text)} == {f"images/{p.name}" for p in written[1:]}
    content = {p: p.read_bytes() for p in written}
    write_markdown(page, table, **GIVEN)
    assert {p: p.read_bytes() for p in written} == content
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| field")}
    assert len(widths) == 1


def test_pictures_follow_the_readers_theme(table, tmp_path):
    _, picture, *_ = write_markdown(tmp_path / "gates.md", table, **GIVEN)
    text = picture.read_text()
    assert "@media (prefers-color-scheme: dark)" in text
    assert text.count("#24292f") == 1  # where the theme defines it


def test_a_file_without_marks_is_left_alone(table, tmp_path):
    page = tmp_path / "gates.md"
    page.write_text("# Mine\n")
    with pytest.raises(ConfigError, match="no place for the results"):
        write_markdown(page, table, **GIVEN)
    assert page.read_text() == "# Mine\n"
    assert not (tmp_path / "images").exists()
