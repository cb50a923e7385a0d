"""A part of a Bundle that is plain values: one JSON file, checked when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ctr_models.errors import ArtifactError


class Part(BaseModel):
    """Values that :class:`pipelines.release.bundle.Bundle` keeps in a file of their own.

    Example:
        >>> class Tally(Part):
        ...     what = "the tally"
        ...     rows: int
        >>> Tally(rows=3).model_dump_json()
        '{"rows":3}'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    what: ClassVar[str]
    """Of a bundle, for messages."""

    def write(self, path: Path) -> None:
        """Write the file, into a folder that stands aside."""
        path.write_text(self.model_dump_json() + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            ArtifactError: it is none.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            raise ArtifactError(
                f"not {cls.what} of a bundle ({'.'.join(map(str, first['loc']))}: {first['msg']})",
                where=str(path),
                remedy="copy the bundle again from where it was made, or train again",
            ) from None
