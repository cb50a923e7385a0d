"""``sluice gates``: which there are, what they cost, and whether one of yours holds the contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.result import Json, write_json

if TYPE_CHECKING:
    from ctr_models.gates.contract import Result


def register(app: typer.Typer) -> None:
    """Add ``sluice gates``."""
    group = typer.Typer(rich_markup_mode="rich")
    group.callback(
        invoke_without_command=True,
        epilog="Examples:\n\nsluice gates\n\nsluice gates --slot field --json -\n\n"
        "sluice gates check my_package.my_gates.MyGate",
    )(gates)
    group.command(
        "check",
        epilog="Examples:\n\nsluice gates check sigmoid2\n\nsluice gates check my_package.my_gates.MyGate\n\n"
        "sluice gates check my_gates.py:MyGate --json -",
    )(check)
    app.add_typer(group, name="gates")


def gates(
    context: typer.Context,
    slot: Annotated[str | None, typer.Option("--slot", help="Only gates that fit this slot.")] = None,
    json: Json = None,
) -> None:
    """List every registered gate: its slots, parameters and operations a row for an example size, and source."""
    if context.invoked_subcommand is not None:
        return
    from ctr_models.errors import ConfigError, nearest
    from ctr_models.gates.base import GATES, SLOTS

    if slot is not None and slot not in SLOTS:
        raise ConfigError(f"no slot {slot!r}", where="--slot", remedy=nearest(slot, SLOTS))
    listed = [_described(name, slot) for name in GATES if slot is None or slot in GATES[name].slots]
    write_json(json, listed)
    if json == "-":
        return

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ctr_models.gates.cost import EXAMPLE

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("gate", "slot"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "FLOPs a row"):
        table.add_column(column, justify="right")
    table.add_column("source", no_wrap=True)
    for gate in listed:
        first, source = gate["name"], gate["source"]
        for place, cost in _folded(gate["slots"]).items():
            table.add_row(first, place, f"{cost['parameters']:,}", f"{cost['flops_per_row']:,.0f}", source)
            first = source = ""
    console = Console()
    console.print(table)
    console.print(
        f"Beside gate none, for {EXAMPLE.fields} fields of dimension {EXAMPLE.dim} (vectors of {EXAMPLE.width}), a "
        f"context of {EXAMPLE.context} where the slot has one, {EXAMPLE.choices} experts or treatments, "
        f"{EXAMPLE.heads} heads, histories of {EXAMPLE.history}. A multiply-add is two operations. The logits of "
        "slot selection are tables of the model's."
    )


def check(
    name: Annotated[
        str,
        typer.Argument(help="A registered name, a dotted path, a module, or a file: my_gates.py:MyGate."),
    ],
    json: Json = None,
) -> None:
    """Run the contract over a gate: shapes, range, gradients, identity start, saving, compiling and more.

    Exit code 1 when a check fails.
    """
    import io
    import logging
    import sys
    import warnings

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ctr_models.gates.contract import CHECKS, run

    warnings.filterwarnings("ignore", module="torch")
    name = _found(name)
    console = Console()
    total = sum(len(c.subjects(name)) for c in CHECKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    logging.disable(logging.ERROR)  # the reason is told below; the compilers would print it over pages
    try:
        with (
            Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress,
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            task = progress.add_task("checking", total=total)
            results = []
            for result in run(name):
                results.append(result)
                progress.update(task, advance=1, description=result.check.name)
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)

    failed = [result for result in results if result.error is not None]
    rows = [
        {"check": r.check.name, "where": _where(r), "passed": r.error is None, "reason": r.error} for r in results
    ]
    write_json(json, {"gate": name, "passed": not failed, "checks": rows})
    if json != "-":
        _report(name, results, console)
    if failed:
        raise typer.Exit(1)


def _report(name: str, results: list[Result], console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Contract of gate {name}")
    for column in ("check", "result", "what holds, or why not"):
        table.add_column(column)
    by_check: dict[str, list[Result]] = {}
    for result in results:
        by_check.setdefault(result.check.name, []).append(result)
    for found in by_check.values():
        check, wrong = found[0].check, [r for r in found if r.error is not None]
        count = "" if len(found) == 1 else f" {len(found)}"
        if not wrong:
            holds = Text((check.run.__doc__ or "").strip())  # as it stands: [floor, bound] is no markup
            table.add_row(check.name, Text(f"passed{count}", "green"), holds)
            continue
        reasons: dict[str, list[str]] = {}
        for result in wrong:
            reasons.setdefault(_short(result.error or ""), []).append(_where(result))
        told = Text("\n".join(f"{', '.join(where)}: {reason}" for reason, where in reasons.items()))
        told.append(f"\nRemedy: {check.remedy}.", "bold")
        table.add_row(check.name, Text(f"failed {len(wrong)} of {len(found)}", "bold red"), told)
    console.print(table)
    failed = sum(r.error is not None for r in results)
    if failed:
        console.print(Text(f"{failed} of {len(results)} checks failed.", "bold red"))
    else:
        console.print(f"All {len(results)} checks passed.")


def _where(result: Result) -> str:
    return "any slot" if isinstance(result.subject, str) else result.subject.place


def _short(error: str) -> str:
    """Return what fits a cell: the compilers' messages run over many lines."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return " ".join(lines[:4]) if lines else "no message"


def _described(name: str, slot: str | None) -> dict[str, Any]:
    from ctr_models.gates.base import GATES
    from ctr_models.gates.cost import cost
    from ctr_models.gates.probe import cases

    costs = {}
    for case in cases(name):  # where a gate may or may not be given a context, the last one is
        if slot in (None, case.slot):
            found = cost(case)
            costs[case.slot] = {"parameters": found.parameters, "flops_per_row": found.flops}
    return {"name": name, "slots": costs, "source": GATES[name].source}


def _folded(costs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return one entry for a gate that fits every slot at the same cost, as ``none`` does."""
    from ctr_models.gates.base import SLOTS

    different = {tuple(cost.values()) for cost in costs.values()}
    return {"every slot": next(iter(costs.values()))} if set(costs) == set(SLOTS) and len(different) == 1 else costs


def _found(name: str) -> str:
    """Return the name by which the registry knows the gate, after importing what has to be."""
    from importlib.util import find_spec

    from ctr_models.gates.base import GATES

    where, _, wanted = name.partition(":")
    if where.endswith(".py"):
        module = _loaded(Path(where))
    elif name.isidentifier() and name not in GATES and find_spec(name) is not None:
        with _told_where(name):
            module = import_module(name)
    else:
        GATES[name]
        return name
    return f"{module.__name__}.{_own_gate(module, where, wanted)}"


def _loaded(file: Path) -> ModuleType:
    """Import a file, wherever it is."""
    import importlib.util
    import sys

    from ctr_models.errors import ConfigError

    if not file.is_file():
        raise ConfigError("no such file", where=str(file), remedy="give the path of a .py file that holds a gate")
    module_name = f"gates_of_{file.stem}"  # a file called json.py shall not stand in for json
    spec = importlib.util.spec_from_file_location(module_name, file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    with _told_where(str(file)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _told_where(source: str) -> Iterator[None]:
    """Say of an error in a user's module that it is one of the user's."""
    from ctr_models.errors import ConfigError

    try:
        yield
    except Exception as error:
        raise ConfigError(f"{type(error).__name__}: {error}", where=source, remedy="mend the file") from error


def _own_gate(module: ModuleType, where: str, wanted: str) -> str:
    """Return the name of the wanted gate, or of the only one, among those that the module defines."""
    from ctr_models.errors import ConfigError, nearest
    from ctr_models.gates.base import Gate

    own = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Gate) and value.__module__ == module.__name__
    ]
    if wanted and wanted not in own:
        raise ConfigError(f"no gate {wanted!r}", where=where, remedy=nearest(wanted, own))
    if not wanted and len(own) != 1:
        problem = f"it holds {len(own)} gates: {', '.join(own)}" if own else "it holds no class derived from Gate"
        raise ConfigError(
            problem, where=where, remedy=f"say which: {where}{':' if where.endswith('.py') else '.'}MyGate"
        )
    return wanted or own[0]
