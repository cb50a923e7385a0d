from __future__ import annotations

import torch

from pipelines.benchmarks.measure import peak_memory, timed


def test_calls_are_timed_in_turn_and_the_best_round_counts() -> None:
    calls: list[str] = []
    seconds = timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, "cpu", least=0.0)
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a", "b", "a", "b"]
    assert set(seconds) == {"a", "b"} and all(s >= 0 for s in seconds.values())


def test_peak_memory_is_what_stands_at_the_same_time() -> None:
    def step() -> torch.Tensor:
        first = torch.ones(1000)  # 4,000 bytes
        second = first + 1  # 8,000
        del first
        third = second + 1  # 8,000 again
        return third + second  # 12,000

    assert peak_memory(step, "cpu") == 12_000


def test_what_the_profiler_says_is_not_shown(capfd) -> None:
    peak_memory(lambda: torch.ones(3), "cpu")
    assert capfd.readouterr().err == ""
