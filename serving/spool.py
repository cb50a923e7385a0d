"""Records on disk that wait for the database: appended and flushed, read back in order, removed once replayed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from ctr_models.errors import ArtifactError
from pipelines.features.files import fsync

log = logging.getLogger("sluice.events")
_HEADER = struct.Struct(">II")
"""Length and CRC-32 of the record that follows."""
_SUFFIX = ".spool"


class SpoolFull(Exception):
    """No room for more: the limit is reached, or the disk is full."""


class Spool:
    """A folder of append-only segments, owned by one process at a time.

    A record is whole or absent: each has its length and checksum before it, and is flushed to disk before
    :meth:`append` returns. What a crash left torn at the end of a segment was never acknowledged and is dropped;
    where whole records stand behind it, it is damage, and they are kept. No record is empty: zeros are none.

    Args:
        folder: made if missing.
        limit: most bytes that all segments may take.

    Raises:
        ArtifactError: another process has the folder.

    Example:
        >>> import tempfile
        >>> with Spool(Path(tempfile.mkdtemp()) / "spool", limit=1000) as spool:
        ...     spool.append([b"first", b"second"])
        ...     spool.read(), spool.pending > 0
        ...     spool.replayed()
        ...     spool.read(), spool.pending
        ([b'first', b'second'], True)
        ([], 0)
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._segment_bytes = max(limit // 8, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ArtifactError("another process uses this spool", where=str(self.folder)) from None
        self._sizes = {path: _settle(path) for path in sorted(self.folder.glob("*" + _SUFFIX))}
        numbers = (int(path.stem) for path in self.folder.glob("*.*") if path.stem.isdecimal())
        self._next = 1 + max(numbers, default=0)  # what was set aside has its number, too
        self._file: int | None = None  # of the newest segment, if it takes more
        self._at = 0  # bytes of the oldest segment that were replayed
        self._read_to = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pending(self) -> int:
        """Bytes that wait."""
        return sum(self._sizes.values()) - self._at

    def append(self, records: Sequence[bytes]) -> None:
        """Write records and return when the disk has them; all or none.

        Raises:
            SpoolFull: no room; nothing was written.
        """
        data = b"".join(_HEADER.pack(len(r), zlib.crc32(r)) + r for r in records)
        if sum(self._sizes.values()) + len(data) > self.limit:
            raise SpoolFull(f"the spool holds {self.pending:,} of {self.limit:,} bytes")
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            _write_all(self._file, data)
            os.fdatasync(self._file)
            if not os.fstat(self._file).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "its file has vanished")
        except OSError as error:
            # What may have been written in part is torn: it is cut off, and if that fails nothing goes after it.
            self._abandon()
            raise SpoolFull(f"the spool can't be written ({error.strerror})") from error
        newest = next(reversed(self._sizes))
        self._sizes[newest] += len(data)
        if self._sizes[newest] >= self._segment_bytes:
            self._shut()

    def read(self, most: int = 2**20) -> list[bytes]:
        """Return the oldest records, some ``most`` bytes of one segment; :meth:`replayed` takes them off."""
        if not self.pending:
            return []
        oldest = next(iter(self._sizes))
        try:
            with open(oldest, "rb") as file:
                file.seek(self._at)
                content = file.read(min(max(most, _HEADER.size), self._sizes[oldest] - self._at))
                records, used = _records(content)
                if not records and len(content) >= _HEADER.size:  # the first one alone is larger than ``most``
                    file.seek(self._at)
                    records, used = _records(file.read(_HEADER.size + _HEADER.unpack_from(content)[0]))
        except FileNotFoundError:
            raise ArtifactError("a segment has vanished", where=str(oldest)) from None
        if not records:
            raise ArtifactError("a record is damaged", where=f"{oldest} at byte {self._at}")
        self._read_to = self._at + used
        return records

    def replayed(self) -> None:
        """Take off what was last read; a segment that is empty then is removed."""
        oldest = next(iter(self._sizes))
        self._at = self._read_to
        if self._at >= self._sizes[oldest]:
            if len(self._sizes) == 1:
                self._shut()
            oldest.unlink()
            del self._sizes[oldest]
            self._at = self._read_to = 0

    def set_aside(self) -> Path:
        """Rename the oldest segment, whose next record can't be read, so that those behind it go on.

        Returns:
            the file as it is called now, for a person to look at.

        Raises:
            SpoolFull: no room for the records that are whole behind it; nothing changed.
        """
        oldest = next(iter(self._sizes))
        if len(self._sizes) == 1:
            self._shut()
        aside, size, at = oldest.with_suffix(".damaged"), self._sizes.pop(oldest), self._at
        self._at = self._read_to = 0
        try:
            if oldest.exists():
                # Written first: after a crash they are there twice, and a row is stored once.
                if whole := _behind(oldest.read_bytes()[at:]):
                    self.append(whole)
                oldest.rename(aside)
        except (SpoolFull, OSError):
            self._sizes = {oldest: size, **self._sizes}
            self._at = self._read_to = at
            raise
        return aside

    def put_by(self, name: str, content: bytes) -> None:
        """Add something to a file beside the segments, and return when the disk has it."""
        with open(self.folder / name, "ab", opener=_for_owner) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fsync(self.folder)

    def close(self) -> None:
        """Let go of the folder; what waits in it stays."""
        self._shut()
        os.close(self._lock)

    def _open(self) -> None:
        path = self.folder / f"{self._next:010d}{_SUFFIX}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._next += 1
        self._sizes[path] = 0
        fsync(self.folder)

    def _shut(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _abandon(self) -> None:
        if self._file is None:
            return
        newest = next(reversed(self._sizes))
        try:
            os.ftruncate(self._file, self._sizes[newest])
        except OSError:
            log.warning("%s keeps a torn tail", newest)
        self._shut()
        if not self._sizes[newest]:
            del self._sizes[newest]
            newest.unlink(missing_ok=True)


def _records(content: bytes) -> tuple[list[bytes], int]:
    """Return the whole, undamaged records at the beginning of some bytes, and how many bytes they take."""
    found, at = [], 0
    while at + _HEADER.size <= len(content):
        length, checksum = _HEADER.unpack_from(content, at)
        record = content[at + _HEADER.size : at + _HEADER.size + length]
        if not length or len(record) < length or zlib.crc32(record) != checksum:
            break
        found.append(record)
        at += _HEADER.size + length
    return found, at


def _behind(content: bytes) -> list[bytes]:
    """Return the whole records behind those that are not."""
    found, at = [], 0
    while at + _HEADER.size <= len(content):
        length, checksum = _HEADER.unpack_from(content, at)
        at += _HEADER.size + length
        record = content[at - length : at]
        if length and len(record) == length and zlib.crc32(record) == checksum:
            found.append(record)
    return found


def _settle(path: Path) -> int:
    """Cut off what a crash left torn; return the bytes that remain."""
    content = path.read_bytes()
    _, used = _records(content)
    if used < len(content):
        if _behind(content[used:]):
            return len(content)  # to be set aside when its turn comes
        log.warning("%s: %d bytes at the end were never acknowledged and are dropped", path, len(content) - used)
        os.truncate(path, used)
    return used


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
