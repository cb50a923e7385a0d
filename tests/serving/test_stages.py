"""Stages follow one another without gaps."""

from __future__ import annotations

from serving.stages import STAGES, Stages


def test_each_begins_where_the_one_before_ended() -> None:
    stages = Stages(1.0)
    for i, name in enumerate(STAGES):
        stages.end(name, 2.0 + i)
    assert [name for name, _, _ in stages.found] == list(STAGES)
    assert [begin for _, begin, _ in stages.found] == [1.0, *(end for _, _, end in stages.found[:-1])]


def test_parts_run_beside_each_other_and_are_found_together() -> None:
    stages = Stages(0.0)
    one, other = stages.part(), stages.part()
    began = one.at, other.at
    other.end("encode")
    one.end("encode")
    assert [begin for _, begin, _ in stages.found] == [began[1], began[0]]
    assert stages.at == 0.0
