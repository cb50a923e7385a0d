from __future__ import annotations

import json

import pytest
import torch

from ctr_models.errors import ArtifactError
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def tensors(seed=0):
    torch.manual_seed(seed)
    return {"model/w": torch.randn(7, 3), "optimizer/w/step": torch.tensor(3.0)}


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    saved = tensors()
    checkpoint.save(tmp_path / "step-1", saved, {"epoch": 2, "loss": 0.1 + 0.2}, ALONE)
    expected = torch.rand(5)
    torch.manual_seed(99)
    found = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    assert checkpoint.verify(tmp_path / "step-1") == {"epoch": 2, "loss": 0.1 + 0.2}
    checkpoint.load(tmp_path / "step-1", found, ALONE)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    assert torch.equal(torch.rand(5), expected)  # the random state went with it


@pytest.mark.parametrize("victim", [".metadata", "__0_0.distcp", "content.json", "random-0.json"])
def test_one_changed_byte_is_found_before_anything_is_read(tmp_path, victim):
    folder = tmp_path / "step-1"
    checkpoint.save(folder, tensors(), {}, ALONE)
    content = bytearray((folder / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / victim).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"file '{victim}' has changed"):
        checkpoint.verify(folder)


def test_missing_and_added_files_are_found(tmp_path):
    folder = tmp_path / "step-1"
    checkpoint.save(folder, tensors(), {}, ALONE)
    (folder / "more").write_text("")
    with pytest.raises(ArtifactError, match="'more' is unexpected"):
        checkpoint.verify(folder)
    (folder / "more").unlink()
    (folder / "random-0.json").unlink()
    with pytest.raises(ArtifactError, match=r"'random-0\.json' is missing"):
        checkpoint.verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="manifest is missing"):
        checkpoint.verify(folder)


def test_weights_of_another_model_are_refused(tmp_path):
    checkpoint.save(tmp_path / "step-1", tensors(), {}, ALONE)
    with pytest.raises(ArtifactError, match="does not fit this model"):
        checkpoint.read_tensors(tmp_path / "step-1", {"model/w": torch.zeros(8, 3)})
    with pytest.raises(ArtifactError, match="does not fit this model"):
        checkpoint.read_tensors(tmp_path / "step-1", {"model/v": torch.zeros(7, 3)})


def test_the_last_few_and_the_best_are_kept(tmp_path):
    kept = Checkpoints(tmp_path, 2, ALONE)
    best = kept.save_best(0, tensors())
    for step in range(1, 5):
        if step == 3:
            best = kept.save_best(1, tensors())
        kept.save(step, tensors(step), {"best": best, "step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-0001", "step-0000000003", "step-0000000004"]
    path, content = kept.latest()
    assert path.name == "step-0000000004"
    assert content["step"] == 4


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    kept = Checkpoints(tmp_path, 2, ALONE)
    for step in (1, 2):
        kept.save(step, tensors(step), {"step": step})
    (tmp_path / "step-0000000002" / "__0_0.distcp").write_bytes(b"half")
    with pytest.warns(
        UserWarning, match="checkpoint passed over: .*step-0000000002: file '__0_0.distcp' has changed"
    ):
        path, content = kept.latest()
    assert content == {"step": 1}
    assert path.name == "step-0000000001"


def test_a_damaged_checkpoint_does_not_crowd_out_those_that_follow(tmp_path):
    kept = Checkpoints(tmp_path, 1, ALONE)
    kept.save(9, tensors(), {"step": 9})
    (tmp_path / "step-0000000009" / "__0_0.distcp").write_bytes(b"half")
    with pytest.warns(UserWarning, match="checkpoint passed over"):
        assert kept.latest() is None
    kept.save(3, tensors(), {"step": 3})
    assert kept.latest()[1] == {"step": 3}


def test_what_a_killed_run_was_writing_goes_when_it_is_resumed(tmp_path):
    kept = Checkpoints(tmp_path, 2, ALONE)
    kept.save(1, tensors(), {"step": 1})
    (tmp_path / ".step-0000000002.abc.tmp").mkdir()
    (tmp_path / ".step-0000000002.abc.tmp" / "half").write_text("")
    assert kept.latest()[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]


def test_lost_best_weights_make_a_checkpoint_useless(tmp_path):
    kept = Checkpoints(tmp_path, 2, ALONE)
    kept.save(1, tensors(), {"best": "best-0000"})
    with pytest.warns(UserWarning, match="best-0000"):
        assert kept.latest() is None


def test_a_folder_that_was_being_written_is_not_seen(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, 2, ALONE)
    kept.save(1, tensors(), {"step": 1})
    monkeypatch.setattr(checkpoint, "sha256_tree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        kept.save(2, tensors(), {"step": 2})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]
    assert kept.latest()[1] == {"step": 1}


def test_content_is_plain_json(tmp_path):
    checkpoint.save(tmp_path / "step-1", tensors(), {"history": [{"auc": 0.5}]}, ALONE)
    assert json.loads((tmp_path / "step-1" / "content.json").read_text()) == {"history": [{"auc": 0.5}]}
