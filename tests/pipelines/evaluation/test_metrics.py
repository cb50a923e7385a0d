from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctr_models.errors import DataError
from pipelines.evaluation.metrics import (
    auc,
    binned,
    ece,
    evaluate,
    gauc,
    logloss,
    normalized_entropy,
    relaimpr,
    user_auc,
)


def auc_by_pairs(label, score):
    """The definition: every click against every non-click, ties one half."""
    y, s = np.asarray(label), np.asarray(score)
    positive, negative = s[y == 1][:, None], s[y == 0][None, :]
    return float((positive > negative).mean() + 0.5 * (positive == negative).mean())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=60).filter(
        lambda rows: 0 < sum(y for y, _ in rows) < len(rows)
    )
)
def test_auc_is_the_share_of_ordered_pairs(rows):
    label, score = zip(*rows, strict=True)
    assert auc(label, score) == pytest.approx(auc_by_pairs(label, score), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 4)), min_size=2, max_size=60).filter(
        lambda rows: 0 < sum(r[0] for r in rows) < len(rows)
    )
)
def test_gauc_is_the_weighted_mean_over_users_with_both_labels(rows):
    label, score, user = (np.array(c) for c in zip(*rows, strict=True))
    parts = []
    for u in np.unique(user):
        own = label[user == u]
        if 0 < own.sum() < len(own):
            parts.append((auc_by_pairs(own, score[user == u]), len(own)))
    if not parts:
        with pytest.raises(DataError, match="no user has both"):
            gauc(label, score, user)
        assert np.isnan(evaluate(label, score / 10, user)["gauc"])
    else:
        values, weights = zip(*parts, strict=True)
        assert gauc(label, score, user) == pytest.approx(np.average(values, weights=weights), abs=1e-12)


def test_auc_does_not_change_with_order_scale_or_precision():
    rng = np.random.default_rng(1)
    y, s = rng.random(5000) < 0.2, rng.random(5000).astype(np.float32)
    turned = rng.permutation(5000)
    assert auc(y, s) == auc(y[turned], s[turned]) == auc(y, 3 * s.astype(np.float64) - 7)
    assert auc(y, s) + auc(y, -s) == pytest.approx(1)
    assert auc(y, np.zeros(5000)) == 0.5


def test_auc_of_many_rows_does_not_overflow():
    y = np.zeros(400_000, dtype=np.float32)
    y[200_000:] = 1
    assert auc(y, np.arange(400_000)) == 1.0


def test_logloss_clips_where_its_docstring_says():
    assert logloss([1], [0.0]) == pytest.approx(-np.log(1e-7))
    assert logloss([0, 1], [0.0, 1.0]) == pytest.approx(1e-7, rel=1e-3)
    assert logloss([0, 1, 1], [0.3, 0.6, 0.9]) == pytest.approx(-np.log([0.7, 0.6, 0.9]).mean())


def test_normalized_entropy_of_the_base_rate_is_one_and_of_the_truth_less():
    rng = np.random.default_rng(2)
    p = rng.beta(1, 4, 20_000)
    y = rng.random(20_000) < p
    assert normalized_entropy(y, np.full(20_000, y.mean())) == pytest.approx(1)
    assert normalized_entropy(y, p) < 0.95


@pytest.mark.parametrize("binning", ["mass", "width"])
def test_ece_tells_calibrated_from_overconfident(binning):
    rng = np.random.default_rng(3)
    p = rng.uniform(size=50_000)
    y = rng.random(50_000) < p
    assert ece(y, p, binning=binning) < 0.01
    assert ece(y, np.sqrt(p), binning=binning) == pytest.approx(np.sqrt(p).mean() - p.mean(), abs=0.01)


def test_bins_keep_equal_predictions_together_whatever_the_order():
    rng = np.random.default_rng(4)
    p = rng.choice([0.1, 0.2, 0.7], 900)
    y = rng.random(900) < p
    count, predicted, observed = binned(y, p, bins=10, binning="mass")
    assert predicted == pytest.approx([0.1, 0.2, 0.7])
    assert count.tolist() == [int((p == v).sum()) for v in (0.1, 0.2, 0.7)]
    assert observed == pytest.approx([y[p == v].mean() for v in (0.1, 0.2, 0.7)])
    turned = rng.permutation(900)
    assert ece(y[turned], p[turned]) == pytest.approx(ece(y, p))
    assert ece(y, np.full(900, 0.4)) == pytest.approx(abs(y.mean() - 0.4))


def test_bins_of_equal_mass_hold_equally_many_rows():
    p = np.random.default_rng(5).random(1000)
    count, _, _ = binned(p > 0.5, p, bins=20, binning="mass")
    assert count.tolist() == [50] * 20
    count, _, _ = binned(p > 0.5, p, bins=20, binning="width")
    assert count.tolist() == np.histogram(p, np.linspace(0, 1, 21))[0].tolist()


def test_user_auc_gives_no_weight_to_users_with_one_label():
    values, impressions = user_auc(
        np.array([False, True, True, False]), np.array([0.1, 0.2, 0.3, 0.4]), np.array([5, 5, 9, 2])
    )
    assert values.tolist() == [0.0, 1.0, 0.0]  # users 2, 5, 9
    assert impressions.tolist() == [0, 2, 0]


def test_relaimpr_as_din_reports_it():
    assert relaimpr(0.8818, 0.8774) == pytest.approx(1.1659, abs=1e-3)
    with pytest.raises(DataError, match="better than chance"):
        relaimpr(0.7, 0.5)


def test_evaluate_gathers_the_single_metrics():
    rng = np.random.default_rng(6)
    p, user = rng.random(500), rng.integers(0, 20, 500)
    y = rng.random(500) < p
    assert evaluate(y, p, user) == {
        "auc": auc(y, p),
        "logloss": logloss(y, p),
        "ne": normalized_entropy(y, p),
        "ece": ece(y, p),
        "gauc": gauc(y, p, user),
    }
    assert "gauc" not in evaluate(y, p)


@pytest.mark.parametrize(
    ("label", "p", "message"),
    [
        ([], [], "metrics: no rows. check the split: it may have left this part empty."),
        ([0, 1], [0.5], "metrics: labels have shape (2,), scores (1,). give one label and one score a row."),
        ([0, 1, 2], [0.1, 0.2, 0.3], "label, row 2: label is 2. use 0 or 1."),
        ([0, 1, float("nan")], [0.1, 0.2, 0.3], "label, row 2: label is nan. use 0 or 1."),
        (
            [0, 1, 1],
            [0.1, float("nan"), float("nan")],
            "score, row 1: score is NaN (2 of 3 rows). look for a diverged run: lower the learning rate or "
            "clip the gradient.",
        ),
        ([0, 1], [0.1, 1.5], "score, row 1: probability is 1.5. pass logits through a sigmoid."),
        (
            [1, 1],
            [0.1, 0.5],
            "label: all 2 labels are 1. this metric needs clicks and non-clicks; check the split.",
        ),
        (
            [0, 0],
            [0.1, 0.5],
            "label: all 2 labels are 0. this metric needs clicks and non-clicks; check the split.",
        ),
    ],
)
def test_bad_input_is_named(label, p, message):
    with pytest.raises(DataError) as error:
        evaluate(label, p)
    assert str(error.value) == message


def test_groups_must_be_one_a_row():
    with pytest.raises(DataError, match=r"groups have shape \(3,\), rows \(2,\)"):
        gauc([0, 1], [0.1, 0.2], [1, 1, 1])
