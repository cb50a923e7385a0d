"""The contract: what every gate holds in every slot that it lists.

The tests of this repository run its clauses over the registry, ``sluice gates check`` over a gate of yours:

    >>> all(result.error is None for result in run("none", skip=("compiled", "exported")))
    True
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ctr_models.gates import slot_clauses  # noqa: F401 importing it adds its clauses
from ctr_models.gates.clauses import CHECKS, Check, has_the_right_shape, is_built, is_declared
from ctr_models.gates.probe import Case

__all__ = ["CHECKS", "Check", "Result", "run"]


@dataclass(frozen=True)
class Result:
    """What a check found.

    Args:
        check: the clause.
        subject: the gate's name or the case.
        error: why it does not hold; None where it does.
    """

    check: Check
    subject: str | Case
    error: str | None


def run(name: str, *, skip: Collection[str] = ()) -> Iterator[Result]:
    """Run the contract over a gate. Where it is not what it says, or gives no result, nothing more is asked.

    Args:
        name: registered name or dotted path.
        skip: names of checks to leave out.

    Raises:
        ConfigError: no such gate.
    """
    broken: set[str | Case] = set()
    for check in CHECKS:
        if check.name in skip:
            continue
        for subject in check.subjects(name):
            if name in broken or subject in broken or (broken and check.scope == "gate"):
                continue
            error = None
            try:
                check.run(subject)
            except AssertionError as failed:
                error = str(failed)
            except Exception as failed:  # a gate of a user's may fail in any way
                error = f"{type(failed).__name__}: {failed}"
            if error is not None and check.run in (is_declared, is_built, has_the_right_shape):
                broken.add(subject)
            yield Result(check, subject, error)
