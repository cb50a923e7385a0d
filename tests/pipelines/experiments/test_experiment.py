from __future__ import annotations

from datetime import UTC, datetime

import polars as pl
import pytest

from ctr_models.errors import ConfigError
from ctr_models.model import ModelSpec
from pipelines.config import parse_config
from pipelines.experiments.experiment import Arm, Condition, Experiment
from pipelines.experiments.statistics import Difference

TREE = {
    "name": "cross-gate",
    "control": "open",
    "arms": [
        {"name": "open", "model": {"gates": {"cross": "none"}}},
        {"name": "gated", "model": {"gates": {"cross": {"name": "sigmoid", "start": "identity"}}}},
        {"name": "deep", "model": {"cross_layers": 5}},
    ],
    "population": [{"column": "country", "values": ["DE", "AT"]}, {"column": "age", "least": 18}],
    "allocation": {"weights": {"open": 2, "gated": 1, "deep": 1}, "salt": "s1"},
    "guardrails": [{"metric": "logloss", "bound": 0.001}],
    "decision": {"alpha": 0.1, "minimum_effect": 0.0005, "seeds": [1, 2]},
}
BASE = ModelSpec.parse({"name": "gdcn", "cross_layers": 2, "mlp": {"hidden": [8], "dropout": 0.1}})


def difference(challenger, metric, value, low, high):
    more = metric != "logloss"
    verdict = "noise" if low <= 0 <= high else "better" if (low > 0) == more else "worse"
    return Difference(challenger, "open", metric, value, low, high, 0.01, 0.95, verdict, 2, 100, 1000)


def test_yaml_reads_back_the_same(tmp_path):
    experiment = Experiment.from_tree(TREE)
    path = tmp_path / "experiment.yaml"
    path.write_text(experiment.to_yaml())
    assert Experiment.load(path) == experiment
    assert Experiment.load(path).hash == experiment.hash


def test_hash_tells_any_change_and_ignores_what_is_default():
    base = Experiment.from_tree(TREE)
    assert Experiment.from_tree({**TREE, "primary": "auc"}).hash == base.hash
    for change in ({"primary": "logloss"}, {"decision": {}}, {"population": []}, {"allocation": {}}):
        assert Experiment.from_tree({**TREE, **change}).hash != base.hash


def test_an_arm_lays_its_values_over_the_model():
    arm = Arm.parse("a=model.mlp.dropout=0.3,model.gates={cross: {name: sigmoid, start: identity}, field: none}")
    assert arm.spec(BASE).to_dict() == {
        "name": "gdcn",
        "cross_layers": 2,
        "mlp": {"hidden": [8], "dropout": 0.3},
        "gates": {"cross": {"name": "sigmoid", "start": "identity"}, "field": {"name": "none"}},
    }
    assert Arm.parse("plain").spec(BASE) == BASE


def test_another_model_or_gate_starts_afresh():
    assert Arm.parse("a=model={name: dnn}").spec(BASE).to_dict() == {"name": "dnn"}
    base = ModelSpec.parse({"name": "finalmlp", "gates": {"feature": {"name": "sigmoid2", "hidden": [8]}}})
    assert Arm.parse("a=model.gates.feature=none").spec(base).gates["feature"].options == {}
    kept = Arm.parse("a=model.gates.feature={name: sigmoid2, start: identity}").spec(base)
    assert kept.gates["feature"].options == {"hidden": [8], "start": "identity"}


def test_arms_differ_by_their_gates_hashes():
    experiment = Experiment.from_tree(TREE)
    hashes = {arm.name: arm.gates(BASE) for arm in experiment.arms}
    assert hashes["open"]["cross"] != hashes["gated"]["cross"] != hashes["deep"]["cross"]
    assert hashes["deep"] == Arm(name="x").gates(BASE)


def test_applying_an_arm_changes_the_model_only():
    config = parse_config({"model": BASE.to_dict(), "seed": 3})
    changed = Arm.parse("a=model.cross_layers=4").apply(config)
    assert changed.model.options["cross_layers"] == 4
    assert changed.model_copy(update={"model": config.model}) == config


def test_a_gate_by_name_goes_where_it_fits():
    assert Arm.of_gate("sigmoid", BASE).model == {"gates": {"cross": "sigmoid"}}
    assert set(Arm.of_gate("none", BASE).model["gates"]) == {"field", "feature", "cross"}
    with pytest.raises(ConfigError, match="gate 'sigmoid' fits no slot of model 'dnn'"):
        Arm.of_gate("sigmoid", ModelSpec(name="dnn"))


ONLINE = {
    "layer": {"name": "ranking", "stop": 0.5},
    "ramp": [{"at": "2026-11-02T00:00:00Z", "weights": {"open": 1, "gated": 1}}],
    "shadow": ["deep"],
    "epsilon": 0.01,
}


def test_an_online_part_stands_in_the_same_object():
    tree = {**TREE, "allocation": {"weights": {"open": 9, "gated": 1}}, "online": ONLINE}
    tree["arms"] = [{**arm, "bundle": f"models:/clicks@{arm['name']}"} for arm in TREE["arms"]]
    experiment = Experiment.from_tree(tree)
    assert Experiment.from_tree(experiment.to_tree()) == experiment
    assert experiment.stages() == ({"open": 9, "gated": 1}, {"open": 1, "gated": 1})
    assert experiment.stages(datetime(2026, 11, 1, tzinfo=UTC)) == ({"open": 9, "gated": 1},)
    offline = Experiment.from_tree({**tree, "online": None, "allocation": {}})
    assert offline.stages() == ({"open": 1, "gated": 1, "deep": 1},)
    again = Experiment.from_tree({**offline.to_tree(), "online": {}})
    assert again.hash == offline.hash  # nothing online changes an offline result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilom": 0.1}, "experiment: online.epsilom: unknown key. did you mean 'epsilon'"),
        ({"epsilon": 1.5}, "online.epsilon: must be at most 1"),
        ({"holdout": 1}, "online.holdout: must be less than 1"),
        ({"shadow": ["dep"]}, "online.shadow names 'dep', which is no arm; did you mean 'deep'"),
        ({"shadow": ["open"]}, "the control can't be a shadow arm"),
        ({"shadow": []}, "online.ramp.0.weights name ['gated', 'open'], the arms are"),
        ({"ramp": [ONLINE["ramp"][0]] * 2}, "must follow each other in time"),
        ({"ramp": [{"at": "2026-11-02T00:00:00", "weights": {}}]}, "online.ramp.0.at"),
        ({"layer": {"name": "x", "start": 0.5, "stop": 0.5}}, "stop must be greater than start"),
        ({"starts": "2026-11-02T00:00:00Z", "ends": "2026-11-01T00:00:00Z"}, "ends must be later than starts"),
        ({"primary": "auc"}, "online.primary: unknown value 'auc'"),
    ],
)
def test_mistakes_of_the_online_part_are_named(change, message):
    with pytest.raises(ConfigError) as error:
        Experiment.from_tree({**TREE, "allocation": {}, "online": {**ONLINE, **change}})
    assert message in str(error.value)


@pytest.mark.parametrize("bundle", ["../secret", "/etc/passwd", "models:/a", "models:/a@b/c", "file:///x", ""])
def test_a_bundle_is_named_never_a_path(bundle):
    with pytest.raises(ConfigError, match=r"arms\.0\.bundle: must match"):
        Experiment.from_tree({**TREE, "arms": [{"name": "open", "bundle": bundle}, *TREE["arms"][1:]]})


@pytest.mark.parametrize("value", ["17", [20], {"a": 1}, float("nan"), None])
def test_a_value_that_is_no_number_is_outside_of_bounds(value):
    assert not Condition(column="age", least=18).holds({"age": value})


@pytest.mark.parametrize(
    ("condition", "inside", "outside"),
    [
        (Condition(column="x", values=("a", "b")), ["a", "b"], ["c", None]),
        (Condition(column="x", least=2), [2.0, 5.0], [1.9, None]),
        (Condition(column="x", least=2, most=3), [2.0, 3.0], [1.0, 4.0, None]),
        (Condition(column="x", least=2), [2.0, float("inf")], [1.0, float("nan"), None]),
        (Condition(column="x", most=2), [2.0, float("-inf")], [3.0, float("nan"), None]),
        (Condition(column="x", least=2), [2, 5], [1, None]),
    ],
)
def test_a_condition_says_the_same_of_a_row_and_of_a_frame(condition, inside, outside):
    values = [*inside, *outside]
    frame = pl.DataFrame({"x": values}).select(condition.expression()).to_series().to_list()
    assert frame == [condition.holds({"x": v}) for v in values] == [True] * len(inside) + [False] * len(outside)
    assert not condition.holds({})


def test_the_rule_wants_better_enough_and_within_guardrails():
    experiment = Experiment.from_tree(TREE)
    fine = [difference("gated", "auc", 0.002, 0.001, 0.003), difference("gated", "logloss", 0.0, -0.001, 0.0009)]
    noise = [difference("deep", "auc", 0.003, -0.001, 0.006), difference("deep", "logloss", 0.0, 0.0, 0.0)]
    assert experiment.decide([*fine, *noise]) == (
        "gated",
        ["gated: better on auc, within all guardrails", "deep: noise on auc"],
    )
    small = [difference("gated", "auc", 0.0004, 0.0002, 0.0006), fine[1]]
    assert experiment.decide([*small, *noise])[0] == "open"
    harmful = [fine[0], difference("gated", "logloss", 0.0005, -0.0001, 0.0011)]
    winner, reasons = experiment.decide([*harmful, *noise])
    assert winner == "open"
    assert reasons[0] == "gated: better on auc, but beyond a guardrail: logloss may worsen by 0.0011"


def test_of_several_that_pass_the_largest_effect_wins():
    experiment = Experiment.from_tree({**TREE, "primary": "logloss", "guardrails": []})
    found = [
        difference("gated", "logloss", -0.003, -0.004, -0.002),
        difference("deep", "logloss", -0.005, -0.006, -0.004),
    ]
    assert experiment.decide(found)[0] == "deep"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": "opne"}, "control 'opne' is no arm; did you mean 'open'"),
        ({"arms": TREE["arms"][:1]}, "experiment: arms"),
        ({"arms": [TREE["arms"][0]] * 2}, "arms appear twice: open"),
        ({"allocation": {"weights": {"open": 1}}}, "allocation.weights name"),
        ({"allocation": {"weights": {"open": 0, "gated": 0, "deep": 0}}}, "sum to zero"),
        ({"primary": "acc"}, "experiment: primary"),
        ({"decision": {"seeds": [1, 1]}}, "decision.seeds appear twice"),
        ({"decision": {"alhpa": 0.1}}, "experiment: decision.alhpa: unknown key. did you mean 'alpha'"),
        ({"population": [{"column": "x"}]}, "either values, or least or most"),
        ({"guardrails": [{"metric": "logloss", "bound": -1}]}, "experiment: guardrails.0.bound"),
        ({"budget": 3}, "experiment: budget: unknown key"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ConfigError) as error:
        Experiment.from_tree({**TREE, **change})
    assert message in str(error.value)


def test_an_arm_may_change_neither_data_nor_budget():
    for text in ("a=train.epochs=50", "a=seed=1", "a=data.path=x"):
        with pytest.raises(ConfigError, match="the same for all arms"):
            Arm.parse(text)
    with pytest.raises(ConfigError, match=r"arm 'a': model\.cross_layres: unknown key"):
        Arm.parse("a=model.cross_layres=3").spec(BASE)
    with pytest.raises(ConfigError, match=r"arm 'a': model\.gates\.corss"):
        Arm.parse("a=model.gates.corss=none").spec(BASE)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        Experiment.load(tmp_path / "none.yaml")


def test_arms_can_sweep_a_setting_within_a_setting():
    base = ModelSpec.parse({"name": "aw_moe", "contrast": {"weight": 0.05, "temperature": 0.1}})
    found = {
        arm.name: arm.spec(base).config().contrast
        for arm in (Arm.parse("t0.1"), Arm.parse("t0.5=model.contrast.temperature=0.5"))
    }
    assert {name: (own.temperature, own.weight) for name, own in found.items()} == {
        "t0.1": (0.1, 0.05),
        "t0.5": (0.5, 0.05),
    }
