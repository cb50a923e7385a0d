"""Parts of a bundle: written and read back; what is none is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctr_models.errors import ArtifactError
from pipelines.release.part import Part


class Tally(Part):
    """A part."""

    what = "the tally"
    rows: int


def test_it_is_read_back(tmp_path: Path) -> None:
    Tally(rows=3).write(tmp_path / "tally.json")
    assert Tally.read(tmp_path / "tally.json") == Tally(rows=3)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": "x"}', '{"rows": 1, "more": 2}'])
def test_what_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tally.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tally\.json: not the tally of a bundle"):
        Tally.read(tmp_path / "tally.json")
