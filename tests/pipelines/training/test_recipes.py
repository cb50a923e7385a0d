from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ctr_models.errors import ArtifactError, ConfigError
from ctr_models.model import ModelSpec
from pipelines.training.distributed import Ranks
from pipelines.training.recipes import (
    RECIPES,
    Context,
    Phase,
    Recipe,
    RecipeConfig,
    RecipeOptions,
    make_recipe,
    run_recipe,
)


class Search(Phase):
    """Trains the big model and notes which fields it found useful."""

    name = "search"

    def run(self, context):
        context.outputs[self.name] = {"keep": ["user", "item"]}
        return context


class Decide(Phase):
    """Drops the other fields, physically, and takes another model."""

    name = "decide"
    broken = False

    def run(self, context):
        if self.broken:
            raise KeyboardInterrupt
        context.schema = context.schema.only(context.outputs["search"]["keep"])
        context.model = ModelSpec.parse("lr")
        context.outputs[self.name] = {"fields": len(context.schema.fields)}
        return context


class Retrain(Phase):
    name = "retrain"

    def run(self, context):
        from pipelines.training.fit import fit

        context.outputs[self.name] = fit(context, context.run_dir / self.name)
        return context


class Pruned(Recipe):
    """Search, decide, retrain: the form that later recipes take."""

    def phases(self):
        return [Search(), Decide(), Retrain()]


@pytest.fixture
def context(config, world, tmp_path):
    def make(resume=False):
        settings = config(epochs=1)
        me = Ranks(0, 1, torch.device("cpu"))
        return Context(
            settings, world, tmp_path / "run", me, settings.model, world.schema, resume=resume, progress=False
        )

    return make


def test_search_decide_retrain_fits_the_same_mechanism(context):
    done = run_recipe(Pruned(RecipeOptions()), context())
    assert done.model.name == "lr"
    assert [f.name for f in done.schema.fields] == ["user", "item"]
    assert list(done.outputs) == ["search", "decide", "retrain"]
    assert done.outputs["retrain"]["weights"].startswith("retrain/best-")


def test_finished_phases_are_skipped_and_their_decisions_kept(context, monkeypatch):
    monkeypatch.setattr(Decide, "broken", True)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(Pruned(RecipeOptions()), context())
    monkeypatch.setattr(Decide, "broken", False)
    monkeypatch.setattr(Search, "run", lambda self, context: pytest.fail("was done already"))
    done = run_recipe(Pruned(RecipeOptions()), context(resume=True))
    assert done.outputs["search"] == {"keep": ["user", "item"]}
    monkeypatch.setattr(Decide, "run", lambda self, context: pytest.fail("was done already"))
    again = run_recipe(Pruned(RecipeOptions()), context(resume=True))
    assert again.outputs == json.loads(json.dumps(done.outputs))
    assert again.model == done.model
    assert again.schema == done.schema


class Encode(Phase):
    """Puts other features in the place of those that were given."""

    name = "encode"

    def run(self, context):
        context.data = replace(context.data, path=context.run_dir / self.name / "features")
        return context


class Encoded(Recipe):
    def phases(self):
        return [Search(), Encode(), Decide()]


def test_features_that_a_phase_made_are_found_again(context, world, monkeypatch):
    from pipelines.training import recipes

    monkeypatch.setattr(Decide, "broken", True)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(Encoded(RecipeOptions()), context())
    monkeypatch.setattr(Decide, "broken", False)
    monkeypatch.setattr(Encode, "run", lambda self, context: pytest.fail("was done already"))
    monkeypatch.setattr(recipes, "_opened", lambda path: replace(world, path=path))
    done = run_recipe(Encoded(RecipeOptions()), context(resume=True))
    assert done.data.path == done.run_dir / "encode" / "features"
    markers = sorted((done.run_dir / "phases").iterdir())
    assert ["data" in json.loads(m.read_text()) for m in markers] == [False, True, False]


def test_without_resume_every_phase_runs(context, monkeypatch):
    run_recipe(Pruned(RecipeOptions()), context())
    monkeypatch.setattr(Search, "run", lambda self, context: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(Pruned(RecipeOptions()), context())


def test_finished_phases_of_other_settings_or_of_another_recipe_are_refused(context):
    run_recipe(Pruned(RecipeOptions()), context())
    changed = context(resume=True)
    optimizer = changed.config.train.optimizer.model_copy(update={"lr": 0.5})
    train = changed.config.train.model_copy(update={"optimizer": optimizer})
    with pytest.raises(ConfigError, match=r"0-search\.json: phase 'search' was finished with other settings"):
        run_recipe(
            Pruned(RecipeOptions()), replace(changed, config=changed.config.model_copy(update={"train": train}))
        )
    with pytest.raises(ConfigError, match="'search' was finished with other settings"):
        run_recipe(Pruned(RecipeOptions()), replace(context(resume=True), model=ModelSpec.parse("dcnv2")))
    with pytest.raises(ConfigError, match="phases: phases of another recipe are finished"):
        run_recipe(make_recipe(RecipeConfig()), context(resume=True))
    train = changed.config.train.model_copy(update={"eval_batch_size": 7, "threads": 1, "slices": ("user",)})
    run_recipe(Pruned(RecipeOptions()), replace(changed, config=changed.config.model_copy(update={"train": train})))


@pytest.mark.parametrize("content", ["{", "{}", "null", "[]", '{"outputs": {}}'])
def test_a_damaged_marker_is_named(context, content):
    run_recipe(Pruned(RecipeOptions()), context())
    (context().run_dir / "phases" / "0-search.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"0-search\.json: the phase's marker is damaged"):
        run_recipe(Pruned(RecipeOptions()), context(resume=True))


def test_names_and_options_are_checked():
    assert "fit" in RECIPES
    with pytest.raises(ConfigError, match=r"unknown recipe 'fitt'\. did you mean 'fit'"):
        make_recipe(RecipeConfig(name="fitt"))
    with pytest.raises(ConfigError, match=r"recipe\.options"):
        make_recipe(RecipeConfig(options={"epochs": 3}))
