from __future__ import annotations

import numpy as np
import pytest
import torch

from ctr_models import Schema, create_model
from ctr_models.batch import EncodedRows
from pipelines.benchmarks import truth_measures as measure
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig
from pipelines.datasets.planted_orders import PlantedOrders, PlantedOrdersOptions
from pipelines.features.prepare import prepare
from pipelines.training.predict import predict

OPTIONS = {"rows": 3000, "orders": [2], "idle": 2, "seed": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    source = DataConfig(source="planted_orders", options=OPTIONS)
    return prepare(open_data(source), None, workdir=tmp_path_factory.mktemp("work"), seed=4, progress=False)


def cross_network(schema, gate="sigmoid", **options):
    torch.manual_seed(0)
    given = {"form": "cross_only", "cross_layers": 2, "embedding_std": 0.5, **options}
    return create_model("gdcn", schema, gates={"cross": gate}, **given)


def test_an_interval_is_students():
    over = measure.interval([1.0, 2.0, 3.0, 4.0])
    assert over.mean == 2.5
    half = 3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert (over.low, over.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert np.isnan(measure.interval([1.0]).low)


def test_dropped_values_are_counted_among_the_known_ones(data):
    rows = measure.numbers_of(data.state, "field_00")
    assert sorted(rows.values()) == [2, 3, 4, 5]
    mask = torch.ones(6)
    mask[[rows["v000"], rows["v001"], rows["v002"]]] = 0
    useless = {"field_00": ["v000", "v001"]}
    assert measure.dropped_values(data.state, {"field_00": mask}, useless) == (1.0, 0.5)
    mask[rows["v000"]] = 0.3
    assert measure.dropped_values(data.state, {"field_00": mask}, useless) == (0.5, 0.5)


def test_products_are_those_of_the_world(data):
    world = PlantedOrders(PlantedOrdersOptions(**OPTIONS))
    batch = measure.whole_split(data, "test")
    products = measure.products_of(data.state, batch, world.signs(), world.fields())
    assert products.shape == (3, data.rows("test"))
    truth = data.frame("test").select("true_probability").collect().to_series().to_numpy()
    assert np.array_equal(products[0].numpy() > 0, truth > 0.5)
    assert set(products.unique().tolist()) == {-1.0, 1.0}


def test_the_last_layers_auc_is_the_models(data):
    model = cross_network(data.schema)
    found = measure.auc_by_layers(model, measure.whole_split(data, "test"))
    scored = predict(model, data, "test")
    assert len(found) == 3
    assert found[-1] == pytest.approx(measure.auc(scored.label, scored.probability), abs=1e-9)


def two_fields(signs):
    """Rows of all four pairs of two fields of two values, whose embeddings have dimension 1 and are the signs."""
    schema = Schema.of({"a": 2, "b": 2}, dim=1)
    single = np.array([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=np.int32)
    rows = EncodedRows(schema, np.zeros((4, 0), np.float32), single, {}, np.zeros(4, np.float32), np.zeros(4, int))
    model = create_model(
        "gdcn", schema, form="cross_only", cross_layers=1, gates={"cross": {"name": "sigmoid", "start": "paper"}}
    )
    for weight in model.inputs.embedding.table_parameters():
        weight.data = torch.tensor(signs).unsqueeze(1)
    return model, rows.batch()


def test_a_gate_that_passes_what_speaks_for_a_product_is_open_for_it():
    """One layer, x = (a b, a b): the gate is a function of (a, b), here open where a = 1."""
    model, batch = two_fields([1.0, -1.0])
    product = batch.sparse.to_dict()["a"].values(), batch.sparse.to_dict()["b"].values()
    a, b = (1.0 - 2.0 * ids for ids in product)
    (layer,) = model.cross.linears
    layer.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    layer.bias.data.zero_()
    model.head.weight.data = torch.tensor([[1.0, 1.0]])
    gate = {name: p for name, p in model.cross.gates[0].named_parameters() if p.dim() == 2}
    (weight,) = gate.values()
    weight.data = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    # Crosses always speak for a * b, and never against it: nothing is held back, half is passed.
    assert measure.openings(model, batch, (a * b).unsqueeze(0)) == pytest.approx([0.5], abs=1e-4)
    # For P = b they speak where a = 1, which is passed, and against it where a = -1, which is not.
    assert measure.openings(model, batch, b.unsqueeze(0)) == pytest.approx([1.0], abs=1e-4)
    assert measure.openings(model, batch, -b.unsqueeze(0)) == pytest.approx([-1.0], abs=1e-4)
    # P = a: as much for as against, both sides alike.
    assert measure.openings(model, batch, torch.ones(1, 4)) == pytest.approx([0.0], abs=1e-4)


def test_a_gate_that_is_not_there_or_not_trained_opens_for_nothing(data):
    world = PlantedOrders(PlantedOrdersOptions(**OPTIONS))
    batch = measure.whole_split(data, "test")
    products = measure.products_of(data.state, batch, world.signs(), world.fields())
    assert measure.openings(cross_network(data.schema, gate="none"), batch, products) == pytest.approx([0, 0, 0])
    untrained = measure.openings(cross_network(data.schema, embedding_std=1e-3), batch, products)
    assert untrained == pytest.approx([0, 0, 0], abs=0.01)


def test_only_a_cross_network_alone_has_openings(data):
    model = cross_network(data.schema, form="stacked")
    batch = measure.whole_split(data, "test")
    for ask in (
        lambda: measure.openings(model, batch, torch.ones(1, len(batch))),
        lambda: measure.auc_by_layers(model, batch),
    ):
        with pytest.raises(ValueError, match="cross_only"):
            ask()


def test_mutual_information_does_not_care_for_names():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 4000)
    assert measure.normalized_mutual_information(np.array([3, 0, 2, 1])[truth], truth) == pytest.approx(1)
    assert measure.normalized_mutual_information(rng.integers(0, 4, 4000), truth) < 0.01
    merged = measure.normalized_mutual_information(truth // 2, truth)
    assert merged == pytest.approx(2 * np.log(2) / (np.log(2) + np.log(4)), abs=0.01)
    assert measure.normalized_mutual_information([0, 0], [0, 0]) == 1.0
    assert measure.normalized_mutual_information([0, 0], [0, 1]) == 0.0
