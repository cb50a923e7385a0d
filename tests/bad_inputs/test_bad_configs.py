"""What a wrong configuration is told, word for word."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest

from ctr_models import GATES, MODELS, Schema, create_model
from ctr_models.errors import ConfigError, nearest
from pipelines.config import load_config
from pipelines.datasets.base import DATASETS, check_options
from pipelines.features.spec import Column
from pipelines.training.config import TrainConfig


def known(names: Iterable[str]) -> str:
    """What is registered grows; the messages list all of it."""
    return "known: " + ", ".join(map(repr, sorted(names))) + "."


TRAIN = known(TrainConfig.model_fields)
COLUMN = known(Column.model_fields)
KINDS = known(get_args(Column.model_fields["kind"].annotation))
SOURCES = known(DATASETS)

# (what, ctr.yaml, message)
FILES = [
    (
        "typo in a key",
        "train: {epoch: 3}",
        f"ctr.yaml: train.epoch: unknown key. did you mean 'epochs'? {TRAIN}",
    ),
    (
        "typo in a key at the top",
        "modle: gdcn",
        "ctr.yaml: modle: unknown key. did you mean 'model'? known: 'data', 'features', 'model', 'name', "
        "'recipe', 'seed', 'tracking', 'train', 'workdir'.",
    ),
    (
        "typo in a key of a column",
        "features: {label: click, columns: [{name: a, kind: categorical, dims: 3}]}",
        f"ctr.yaml: features.columns.0.dims: unknown key. did you mean 'dim'? {COLUMN}",
    ),
    (
        "typo in an encoding, which also leaves the right key missing",
        "features: {label: click, columns: [{name: a, kind: categorical, encode: {how: hash, bucket: 9}}]}",
        "ctr.yaml: features.columns.0.encode.bucket: unknown key. did you mean 'buckets'? known: 'buckets', "
        "'how', 'salt'.",
    ),
    (
        "a key twice",
        "seed: 1\nseed: 2",
        "ctr.yaml: not valid YAML: key 'seed' appears twice, line 2, column 1",
    ),
    (
        "a bracket left open",
        "train: {epochs: 3",
        "ctr.yaml: not valid YAML: expected ',' or '}', but got '<stream end>', line 1, column 18",
    ),
    ("a list", "- seed: 1", "ctr.yaml: expected keys, found list"),
    (
        "text for a number",
        "train: {optimizer: {lr: abc}}",
        "ctr.yaml: train.optimizer.lr: expected a number, got 'abc'",
    ),
    (
        "a number out of its range",
        "train: {optimizer: {lr: -1}}",
        "ctr.yaml: train.optimizer.lr: must be greater than 0, got -1",
    ),
    ("no epoch", "train: {epochs: 0}", "ctr.yaml: train.epochs: must be at least 1, got 0"),
    ("half an epoch", "train: {epochs: 1.5}", "ctr.yaml: train.epochs: expected a whole number, got 1.5"),
    (
        "an optimiser that is not there",
        "train: {optimizer: {name: adamw}}",
        "ctr.yaml: train.optimizer.name: unknown value 'adamw'. did you mean 'adam'? known: 'adagrad', 'adam', "
        "'sgd'.",
    ),
    (
        "a name that would be a path",
        "name: ../../etc",
        "ctr.yaml: name: must match ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$, got '../../etc'",
    ),
    (
        "unknown model",
        "model: gdnc",
        f"ctr.yaml: model.name: unknown model 'gdnc'. did you mean 'gdcn'? {known(MODELS)}",
    ),
    (
        "a model without a name",
        "model: {cross_layers: 3}",
        f"ctr.yaml: model: a model needs a name. one of {list(MODELS)}.",
    ),
    (
        "unknown option of a model",
        "model: {name: gdcn, cross_layer: 3}",
        "ctr.yaml: model.cross_layer: unknown key. did you mean 'cross_layers'? known: 'cross_layers', "
        "'embedding_std', 'form', 'gates', 'kernels', 'mlp', 'name'.",
    ),
    (
        "an option of a model with a wrong value",
        "model: {name: gdcn, cross_layers: many}",
        "ctr.yaml: model.cross_layers: expected a whole number, got 'many'",
    ),
    (
        "a dotted path that leads nowhere",
        "model: {name: no_such_package.Model}",
        "ctr.yaml: model.name: can't import model 'no_such_package.Model' (No module named 'no_such_package'). "
        "give a registered name or the dotted path of an importable class.",
    ),
    (
        "a dotted path to something else",
        "model: {name: json.dumps}",
        "ctr.yaml: model.name: 'json.dumps' is no model. derive a class from CTRModel.",
    ),
    (
        "unknown gate",
        "model: {name: gdcn, gates: {cross: sigmiod}}",
        f"ctr.yaml: model.gates.cross: unknown gate 'sigmiod'. did you mean 'sigmoid'? {known(GATES)}",
    ),
    (
        "unknown slot",
        "model: {name: gdcn, gates: {crosses: sigmoid}}",
        "ctr.yaml: model.gates.crosses: model 'gdcn' has no gate slot 'crosses'. did you mean 'cross'? "
        f"{known(MODELS['gdcn'].slots())}",
    ),
    (
        "a list of gates",
        "model: {name: gdcn, gates: [sigmoid]}",
        "ctr.yaml: model.gates: expected slot: gate, got ['sigmoid']",
    ),
    (
        "no gate, as YAML 1.1 reads it",
        "model: {name: gdcn, gates: {cross: no}}",
        "ctr.yaml: model.gates.cross: expected a gate's name or keys, got False. write none for no gate; YAML "
        "reads no and off as false.",
    ),
    (
        "a number for a model",
        "model: 3",
        "ctr.yaml: model: expected a name or keys, got 3. write model: gdcn.",
    ),
    (
        "a dotted path that begins with a dot",
        "model: .x.y",
        "ctr.yaml: model.name: can't import model '.x.y' (the 'package' argument is required to perform a relative "
        "import for '.x'). give a registered name or the dotted path of an importable class.",
    ),
    (
        "a day that is none",
        "data: {options: {until: 2026-02-30}}",
        "ctr.yaml: not valid YAML: day is out of range for month",
    ),
    (
        "a list as a key",
        "? [seed]\n: 1",
        "ctr.yaml: not valid YAML: a key can't be a list, line 1, column 3",
    ),
    (
        "unknown option of a gate",
        "model: {name: finalmlp, gates: {feature: {name: sigmoid2, hiden: [64]}}}",
        "ctr.yaml: model.gates.feature.hiden: unknown key. did you mean 'hidden'? known: 'activation', 'context', "
        "'hidden', 'learned_size', 'start', 'tables'.",
    ),
    (
        "unknown source",
        "data: {source: criteoo}",
        f"data.source: unknown data source 'criteoo'. did you mean 'criteo'? {SOURCES}",
    ),
    (
        "a source's option out of its range",
        "data: {source: click_world, options: {users: 3}}",
        "data.options.users: must be at least 10, got 3",
    ),
    (
        "no row left to test",
        "data: {split: {train: 0.9, valid: 0.2}}",
        "ctr.yaml: data.split: train and valid leave no row to test; make them sum to less than 1",
    ),
    (
        "no label",
        "features: {columns: [{name: a, kind: categorical}]}",
        "ctr.yaml: features.label: required key is missing. add it.",
    ),
    (
        "no column",
        "features: {label: click, columns: []}",
        "ctr.yaml: features.columns: must hold at least 1, got []",
    ),
    (
        "a column twice",
        "features: {label: click, columns: [{name: a, kind: categorical}, {name: a, kind: numeric}]}",
        "ctr.yaml: features: columns appear twice: a",
    ),
    (
        "the label as a feature",
        "features: {label: click, columns: [{name: click, kind: categorical}]}",
        "ctr.yaml: features: column 'click' reads the label 'click': the model would see the answer",
    ),
    (
        "unknown kind",
        "features: {label: click, columns: [{name: a, kind: category}]}",
        f"ctr.yaml: features.columns.0.kind: unknown value 'category'. did you mean 'categorical'? {KINDS}",
    ),
    (
        "an encoding of another kind",
        "features: {label: click, columns: [{name: a, kind: numeric, encode: {how: hash, buckets: 9}}]}",
        "ctr.yaml: features.columns.0: a numeric column can't be encoded by 'hash', only by standard, quantile, "
        "log",
    ),
    (
        "unknown encoding",
        "features: {label: click, columns: [{name: a, kind: categorical, encode: {how: hashing}}]}",
        "ctr.yaml: features.columns.0.encode.how: unknown value 'hashing'. did you mean 'hash'? known: 'hash', "
        "'log', 'quantile', 'standard', 'vocabulary'.",
    ),
    (
        "a history without time",
        "features: {label: click, user: u, columns: [{name: a, kind: categorical}, "
        "{name: past, kind: sequence, table: a, from_log: {column: a}}]}",
        "ctr.yaml: features: sequence 'past' is made from the log and needs features.user and .timestamp",
    ),
    (
        "a dimension that the shared table does not have",
        "features: {label: click, dim: 8, columns: [{name: a, kind: categorical}, "
        "{name: b, kind: categorical, table: a, dim: 4}]}",
        "ctr.yaml: features: column 'b' has dim 4, its table 'a' 8",
    ),
    (
        "a table that no column owns",
        "features: {label: click, columns: [{name: a, kind: categorical, table: b}]}",
        "ctr.yaml: features: column 'a' shares table 'b', which no id column is named after",
    ),
]

# (override, message)
OVERRIDES = [
    ("train", "override 'train': an override is written key.sub=value"),
    ("seed.x=3", "override 'seed.x=3': 'seed' holds a value, not keys"),
    (
        "train.epochs=[1",
        "override 'train.epochs=[1': not valid YAML: expected ',' or ']', but got '<stream end>', line 1, column 3",
    ),
    (
        "data.options.until=2026-13-45",
        "override 'data.options.until=2026-13-45': not valid YAML: month must be in 1..12",
    ),
    (
        "features.columns.7.dim=8",
        "override 'features.columns.7.dim=8': '7' is no position in a list of 1. count from 0.",
    ),
]


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_file(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ctr.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_options(load_config(Path("ctr.yaml")).data)
    assert str(caught.value) == message


@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_override(override: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ctr.yaml"
    file.write_text("seed: 1\nfeatures: {label: click, columns: [{name: a, kind: categorical}]}")
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert str(caught.value) == message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "ctr.yml")
    assert str(caught.value) == f"{tmp_path}/ctr.yml: no such file. sluice init writes one."


def test_a_folder_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert str(caught.value) == f"{tmp_path}: can't be read (Is a directory)"


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "ctr.yaml"
    file.write_bytes(b"seed: 1\n\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: not valid YAML: not UTF-8 at byte 8"


def test_a_gate_that_does_not_fit_its_slot() -> None:
    with pytest.raises(ConfigError) as caught:
        create_model("gdcn", Schema.of({"user": 10}), gates={"cross": "squeeze_excite"})
    assert str(caught.value) == (
        "model.gates.cross: gate 'squeeze_excite' does not fit slot 'cross'. it fits ['field']; this slot takes "
        f"{[name for name in GATES if 'cross' in GATES[name].slots]}."
    )


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ConfigError) as caught:
        create_model("finalmlp", Schema.of({"user": 10}), heads=7)
    assert str(caught.value) == (
        "model.heads: 7 heads don't divide streams of 400 and 400. one of [1, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, "
        "80, 100, 200, 400]."
    )


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "ctr.yaml"
    file.write_text("train: {optimizer: {lr: 1e-3, eps: 1E-8}, window_rows: 1_000}")
    train = load_config(file).train
    assert (train.optimizer.lr, train.optimizer.eps, train.window_rows) == (1e-3, 1e-8, 1000)


def test_of_very_many_the_near_ones_are_named() -> None:
    many = [f"{letter * 9}" for letter in "abcdefghijklmnopqrstuvwxyzABCDEF"] + ["auc_sigmoid", "auc_sigmoid2"]
    assert nearest("auc_sigmiod", many) == (
        "did you mean 'auc_sigmoid'? known: 'auc_sigmoid', 'auc_sigmoid2' and 32 more"
    )
    assert nearest("?", many).startswith("known: 'AAAAAAAAA', ")
    assert nearest("?", many).endswith(" and 26 more")


def test_nothing_to_choose_from() -> None:
    assert nearest("a", []) == "none is known"
