"""Files are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.features import files
from pipelines.features.files import atomic_directory, atomic_write, fsync, sha256_file, sha256_tree


def fail_half_way(final: Path) -> None:
    with atomic_directory(final) as folder:
        (folder / "x").write_text("new")
        raise RuntimeError("half way")


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "a" / "b"
    with atomic_directory(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not final.exists()
    assert (final / "sub" / "x").read_text() == "1"
    assert [p.name for p in final.parent.iterdir()] == ["b"]


def test_what_is_renamed_is_on_disk_and_so_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    with atomic_directory(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
    assert synced == [str(folder / "x"), str(folder), str(tmp_path)]
    with pytest.raises(FileNotFoundError):
        fsync(tmp_path / "gone")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half"):
        fail_half_way(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_directory(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(RuntimeError, match="half"):
        fail_half_way(tmp_path / "a")
    assert (tmp_path / "a" / "x").read_text() == "old"


def test_a_directory_is_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "a") as folder:
            (folder / text).write_text(text)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_old_directory_outlives_a_rename_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    with atomic_directory(tmp_path / "a") as folder:
        (folder / "x").write_text("old")
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename, seen = os.rename, []

    def watched(source: Path, target: Path) -> None:
        seen.append((tmp_path / "a" / "x").exists())
        if Path(target) == tmp_path / "a" and len(seen) == 3:
            raise PermissionError
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    if can_exchange:
        with atomic_directory(tmp_path / "a") as folder:
            (folder / "x").write_text("new")
        assert seen == [True]
    else:
        with pytest.raises(PermissionError), atomic_directory(tmp_path / "a") as folder:
            (folder / "x").write_text("new")
    assert (tmp_path / "a" / "x").read_text() == ("new" if can_exchange else "old")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_directory_is_replaced_without_an_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    test_a_directory_is_replaced(tmp_path)


def test_atomic_write_replaces_and_leaves_no_crumbs(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.json"
    atomic_write(path, "é")
    atomic_write(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_hashes_tell_files_apart(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b").write_text("1")
    (tmp_path / "sub" / "a").write_text("2")
    tree = sha256_tree(tmp_path)
    assert list(tree) == ["b", "sub/a"]
    assert tree["b"] == sha256_file(tmp_path / "b") != tree["sub/a"]
