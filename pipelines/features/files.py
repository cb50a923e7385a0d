"""Files that are whole or absent: written aside, flushed to disk, then renamed; and their hashes."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``final`` when the block ends well, and vanishes when it doesn't.

    A reader sees the old folder or the new one whole; so does who comes after a crash. (File systems that can't
    exchange two names show no folder for an instant.)

    Args:
        final: where the folder shall stand; missing parents are made.

    Example:
        >>> root = Path(tempfile.mkdtemp())
        >>> with atomic_directory(root / "state") as folder:
        ...     _ = (folder / "a.json").write_text("{}")
        >>> sorted(p.name for p in root.rglob("*"))
        ['a.json', 'state']
    """
    final = Path(final)
    with _named(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        # mkdtemp makes folders that only their owner may read; the result should follow the umask.
        os.chmod(aside, 0o777 & ~_umask())
        yield aside
        for path in sorted(aside.rglob("*")):
            fsync(path)
        fsync(aside)
        _replace_directory(aside, final)
        fsync(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_directory(aside: Path, final: Path) -> None:
    """Rename ``aside`` to ``final``; what stands there already changes places with it."""
    try:
        os.rename(aside, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not _exchange(aside, final):
            old = aside.with_suffix(".old")
            os.rename(final, old)
            try:
                os.rename(aside, final)
            except OSError:
                os.rename(old, final)
                raise
            os.rename(old, aside)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change names at one stroke; False where kernel, C library or file system can't."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, never meets half of it.

    Args:
        path: the file; missing parents are made.
        content: bytes, or text to be written as UTF-8.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with _named(path), os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        with _named(path):
            os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors of the operating system name the path that was asked for, not the one aside."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> _ = path.write_bytes(b"")
        >>> sha256_file(path)[:16]
        'e3b0c44298fc1c14'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file under ``directory``, by its path inside it, sorted."""
    files = sorted(p for p in Path(directory).rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): sha256_file(p) for p in files}


def fsync(path: Path) -> None:
    """Return once a file, or the names in a folder, would outlast a power failure.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "new").touch()
        >>> fsync(folder)
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    value = os.umask(0o022)
    os.umask(value)
    return value
