from __future__ import annotations

import pytest

from pipelines.benchmarks.truth_parts import PARTS
from pipelines.benchmarks.truth_plots import PLOTS, experts_plot, orders_plot, shortcuts_plot, values_plot
from pipelines.evaluation.plots import svg


def orders(right, wrong):
    return {f"opening_{j}": right if j == 3 else wrong for j in (2, 3, 4)} | {
        "auc_up_to_1": 0.5,
        "auc_up_to_2": 0.8,
    }


def test_every_part_has_a_plot():
    assert set(PLOTS) == set(PARTS)


def test_the_orders_plot_writes_means_into_its_cells():
    text = svg(orders_plot({"order_3": [orders(0.2, 0.0), orders(0.4, 0.02)]}))
    assert "0.30" in text
    assert text.count("0.01") == 2
    assert "order in the world" in text


def test_worlds_are_dots_beside_their_mean():
    axes = experts_plot({"softmax": [{"nmi": 0.8}, {"nmi": 0.9}], "comet": [{"nmi": 0.3}, {"nmi": 0.4}]}).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["softmax", "comet"]
    dots = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 2 and line.get_marker() == "o"]
    assert [list(y) for y in dots] == [[0.8, 0.9], [0.3, 0.4]]


def test_arms_without_a_selection_are_left_out():
    axes = values_plot({"annealed": [{"recall": 1.0, "false_drops": 0.0}], "none": [{"auc": 0.7}]}).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["annealed"]


def test_the_best_possible_is_drawn_beside_the_gates():
    found = {"none": [{"auc_disagrees": 0.6, "best_disagrees": 0.7}, {"auc_disagrees": 0.5, "best_disagrees": 0.8}]}
    line = next(line for line in shortcuts_plot(found).axes[0].lines if line.get_label() == "best possible")
    assert line.get_ydata()[0] == pytest.approx(0.75)
