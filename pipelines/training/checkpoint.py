"""Checkpoints: whole or absent, verified before they are read, loadable on another number of ranks."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from ctr_models.errors import ArtifactError
from pipelines.features.files import atomic_directory, atomic_write, sha256_tree
from pipelines.training.distributed import Ranks

MANIFEST = "manifest.json"


def save(directory: Path, tensors: Mapping[str, Any], content: Mapping[str, Any], me: Ranks) -> None:
    """Write a checkpoint from all ranks; it appears under its name only when it is whole and on disk.

    Args:
        directory: its final name, on storage that all ranks see.
        tensors: flat, by name; sharded tensors are written by the ranks that hold them.
        content: plain values of rank 0.
        me: this process.
    """
    state = {name: tensor.detach() if type(tensor) is torch.Tensor else tensor for name, tensor in tensors.items()}
    with _shared_directory(directory, me) as folder:
        with _quiet():
            dcp.save(
                state,
                storage_writer=FileSystemWriter(folder, sync_files=False, overwrite=True),
                no_dist=me.world == 1,
            )
        random = torch.get_rng_state().numpy().tobytes().hex()
        atomic_write(folder / f"random-{me.rank}.json", json.dumps({"torch": random}))
        me.wait()
        if me.first:
            atomic_write(folder / "content.json", json.dumps(dict(content), indent=1))
            atomic_write(folder / MANIFEST, json.dumps({"format": 1, "files": sha256_tree(folder)}, indent=1))


def verify(directory: Path) -> dict[str, Any]:
    """Check every file's hash, and only then return what :func:`save` was given as content.

    Raises:
        ArtifactError: a file is missing, added or changed, or there is no manifest.
    """
    remedy = "use an older checkpoint, or train again"
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        expected = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError("the manifest is missing or damaged", where=str(directory), remedy=remedy) from None
    found = sha256_tree(directory)
    found.pop(MANIFEST, None)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            state = (
                "is missing" if name not in found else "is unexpected" if name not in expected else "has changed"
            )
            raise ArtifactError(f"file {name!r} {state}", where=str(directory), remedy=remedy)
    return json.loads((directory / "content.json").read_text())


def load(directory: Path, tensors: Mapping[str, Any], me: Ranks) -> None:
    """Read a verified checkpoint into ``tensors``, in place, and set torch's random state.

    Raises:
        ArtifactError: a tensor is absent or of another shape.
    """
    state = {name: tensor.detach() if type(tensor) is torch.Tensor else tensor for name, tensor in tensors.items()}
    read_tensors(directory, state, alone=me.world == 1)
    random = directory / f"random-{me.rank}.json"
    if random.exists():  # not when the number of ranks has grown
        saved = bytearray.fromhex(json.loads(random.read_text())["torch"])
        torch.set_rng_state(torch.frombuffer(saved, dtype=torch.uint8))


def read_tensors(directory: Path, tensors: Mapping[str, Any], *, alone: bool = True) -> None:
    """Read tensors of a verified checkpoint in place, whatever number of ranks wrote it.

    Raises:
        ArtifactError: a tensor is absent or of another shape.
    """
    try:
        with _quiet():
            dcp.load(dict(tensors), storage_reader=FileSystemReader(directory), no_dist=alone)
    except (RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"does not fit this model ({reason})",
            where=str(directory),
            remedy="resume with the configuration that wrote it",
        ) from None


class Checkpoints:
    """The checkpoints of a run: ``step-<number>``, the last few kept, and the best weights.

    Args:
        directory: of the run's checkpoints.
        keep: how many steps to keep.
        me: this process.
    """

    def __init__(self, directory: Path, keep: int, me: Ranks) -> None:
        self._directory, self._keep, self._me = directory, keep, me

    def save(self, step: int, tensors: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Write ``step-<step>``, then drop what is too old or no longer the best.

        Later steps go too: a run writes an earlier one only if those were damaged, and they must not crowd it out.
        """
        own = self._directory / step_name(step)
        save(own, tensors, content, self._me)
        if self._me.first:
            steps = [s for s in self._steps() if s.name <= own.name]
            for gone in {*self._steps()} - {*steps[-self._keep :]}:
                shutil.rmtree(gone, ignore_errors=True)
            kept = {
                json.loads((s / "content.json").read_text()).get("best") for s in self._steps() if _has_content(s)
            }
            for best in self._directory.glob("best-*"):
                if best.name not in kept:
                    shutil.rmtree(best, ignore_errors=True)
        self._me.wait()

    def save_best(self, epoch: int, weights: Mapping[str, Any]) -> str:
        """Write the weights of the best epoch so far and return the folder's name."""
        name = f"best-{epoch:04d}"
        save(self._directory / name, weights, {"epoch": epoch}, self._me)
        return name

    def path(self, name: str) -> Path:
        """Return the folder of that name."""
        return self._directory / name

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest whole checkpoint and its content; damaged ones are passed over with a warning.

        What a killed run was writing is removed, or it would stay for ever.
        """
        found = None
        if self._me.first:
            for left in [*self._directory.glob(".step-*"), *self._directory.glob(".best-*")]:
                shutil.rmtree(left, ignore_errors=True)
            for step in reversed(self._steps()):
                try:
                    content = verify(step)
                    if content.get("best"):
                        verify(self.path(content["best"]))
                    found = step, content
                    break
                except ArtifactError as error:
                    warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
        return self._me.share(found)

    def _steps(self) -> list[Path]:
        return sorted(self._directory.glob("step-*"))


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:010d}"


def _has_content(step: Path) -> bool:
    return (step / "content.json").is_file()


@contextmanager
def _shared_directory(final: Path, me: Ranks) -> Iterator[Path]:
    """One atomic directory for all ranks: rank 0 makes it and gives it its name at the end."""
    if me.first:
        with atomic_directory(final) as folder:
            yield me.share(folder)
    else:
        yield me.share(None)
    me.wait()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from telling the user how a checkpoint of one process is written."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.checkpoint", "torch.distributed")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
