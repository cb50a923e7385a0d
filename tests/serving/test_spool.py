"""The spool: in order, whole or absent, bounded, and of one process."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ctr_models.errors import ArtifactError
from serving import spool as module
from serving.spool import Spool, SpoolFull


def drain(spool: Spool, most: int = 2**20) -> list[bytes]:
    found = []
    while records := spool.read(most):
        found += records
        spool.replayed()
    return found


@pytest.mark.parametrize("most", [1, 40, 2**20])
def test_records_come_back_in_order_over_segments_and_restarts(tmp_path: Path, most: int) -> None:
    written = [bytes([i]) * (1 + i % 50) for i in range(200)]
    for start in range(0, 200, 50):
        with Spool(tmp_path, limit=20_000) as spool:
            for record in written[start : start + 50]:
                spool.append([record])
    assert len(list(tmp_path.glob("*.spool"))) > 3
    with Spool(tmp_path, limit=20_000) as spool:
        assert drain(spool, most) == written
        assert spool.pending == 0 and not list(tmp_path.glob("*.spool"))
        spool.append([b"more"])
        assert drain(spool) == [b"more"]


def test_what_was_read_but_not_replayed_comes_again(tmp_path: Path) -> None:
    with Spool(tmp_path, limit=1000) as spool:
        spool.append([b"a", b"b"])
        assert spool.read() == spool.read() == [b"a", b"b"]
    with Spool(tmp_path, limit=1000) as spool:
        assert drain(spool) == [b"a", b"b"]


def test_a_torn_tail_is_dropped_at_every_byte(tmp_path: Path) -> None:
    with Spool(tmp_path / "whole", limit=1000) as spool:
        spool.append([b"first", b"second"])
    (path,) = (tmp_path / "whole").glob("*.spool")
    content = path.read_bytes()
    for cut in range(13, len(content)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / path.name).write_bytes(content[:cut])
        with Spool(folder, limit=1000) as spool:
            spool.append([b"third"])
            assert drain(spool) == [b"first", b"third"]


def test_a_flipped_bit_ends_what_is_believed(tmp_path: Path) -> None:
    with Spool(tmp_path, limit=1000) as spool:
        spool.append([b"first", b"second"])
        (path,) = tmp_path.glob("*.spool")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
        assert spool.read() == [b"first"]
        spool.replayed()
        with pytest.raises(ArtifactError, match="damaged"):
            spool.read()
        spool.append([b"third"])
        assert spool.set_aside().read_bytes().startswith(content)
        spool.append([b"fourth"])
        assert drain(spool) == [b"third", b"fourth"]


def test_zeros_at_the_end_are_no_records(tmp_path: Path) -> None:
    with Spool(tmp_path, limit=1000) as spool:
        spool.append([b"first"])
    (path,) = tmp_path.glob("*.spool")
    with open(path, "ab") as file:
        file.write(bytes(64))  # what a power cut leaves of a write that the disk never got
    with Spool(tmp_path, limit=1000) as spool:
        assert drain(spool) == [b"first"]


def test_what_stands_behind_a_flipped_bit_is_not_taken_for_torn(tmp_path: Path) -> None:
    with Spool(tmp_path, limit=1000) as spool:
        spool.append([b"first"])
        spool.append([b"second"])
        spool.append([b"third"])
    (path,) = tmp_path.glob("*.spool")
    content = bytearray(path.read_bytes())
    content[content.index(b"second")] ^= 1
    path.write_bytes(bytes(content))
    with Spool(tmp_path, limit=1000) as spool:
        assert spool.read() == [b"first"]
        spool.replayed()
        with pytest.raises(ArtifactError, match="damaged"):
            spool.read()
        assert spool.set_aside().read_bytes() == bytes(content)
        assert drain(spool) == [b"third"]


def test_what_is_set_aside_is_never_written_over(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        with Spool(tmp_path, limit=1000) as spool:
            spool.append([content])
            spool.set_aside()
            drain(spool)
    assert len(list(tmp_path.glob("*.damaged"))) == 2


def test_it_is_bounded_and_takes_more_once_drained(tmp_path: Path) -> None:
    with Spool(tmp_path, limit=100) as spool:
        spool.append([b"x" * 60])
        with pytest.raises(SpoolFull, match="68 of 100 bytes"):
            spool.append([b"y" * 60])
        spool.append([b"z" * 10])
        assert drain(spool) == [b"x" * 60, b"z" * 10]
        spool.append([b"y" * 60])
        assert drain(spool) == [b"y" * 60]


@pytest.mark.parametrize("written", [0, 5])
def test_a_full_disk_is_told_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    with Spool(tmp_path, limit=1000) as spool:
        spool.append([b"first"])

        def full(file: int, data: bytes) -> None:
            os.write(file, data[:written])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(module, "_write_all", full)
            for _ in range(2):
                with pytest.raises(SpoolFull, match="No space left"):
                    spool.append([b"second"])
        spool.append([b"third"])
        assert drain(spool) == [b"first", b"third"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Spool(tmp_path, limit=100), pytest.raises(ArtifactError, match="another process"):
        Spool(tmp_path, limit=100)
    Spool(tmp_path, limit=100).close()


def test_only_the_owner_reads_what_waits(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool", limit=1000) as spool:
        spool.append([b"row"])
        files = list(spool.folder.iterdir())
    assert len(files) == 2 and all(file.stat().st_mode & 0o077 == 0 for file in files)
