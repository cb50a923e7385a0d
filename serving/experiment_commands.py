"""``sluice experiments``: what live experiments show, their guardrails, and pauses of their arms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipelines.commands.result import Json, write_json
from serving import EMBEDDED
from serving.event_commands import Url

if TYPE_CHECKING:
    from rich.table import Table

    from serving.analysis import Rate, Results
    from serving.database import Database
    from serving.experiments import Experiments

Name = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Its name.")]
ArmName = Annotated[str, typer.Argument(metavar="ARM", help="Not the control.")]
Reason = Annotated[str, typer.Option(help="For people; it is kept.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands = typer.Typer(
        name="experiments",
        no_args_is_help=True,
        help="Live experiments: results, guardrails, pauses. They are made by POST /v1/experiments.",
        epilog="Examples:\n\nsluice experiments results gates\n\n"
        "sluice experiments results gates --events postgresql://sluice@db/events --json -\n\n"
        "sluice experiments check\n\n"
        'sluice experiments resume gates gated --reason "the price feature is back"',
    )
    for command in (results, check, pause, resume):
        commands.command(command.__name__)(command)
    app.add_typer(commands)


def results(
    experiment: Name,
    events: Url = EMBEDDED,
    interval: Annotated[
        Literal["sequential", "fixed"],
        typer.Option(
            help="sequential holds however often one looks; fixed for one look at a moment set beforehand."
        ),
    ] = "sequential",
    at: Annotated[
        datetime | None, typer.Option(help="As it stood at this time, in UTC.", show_default="now")
    ] = None,
    window_hours: Annotated[
        float, typer.Option(min=0.01, max=24 * 90, help="Events count so long after the exposure.")
    ] = 24.0,
    json: Json = None,
) -> None:
    """Show what each arm of an experiment brought in its present stage, and the differences from the control.

    Units are the clusters, as in the offline comparison. Results begin anew when shares change.

    Example: sluice experiments results gates --json -
    """
    from datetime import UTC, timedelta

    from rich.console import Console

    from serving.analysis import analyse

    with _opened(events) as (database, kept):
        found = analyse(
            database,
            kept,
            experiment,
            at=None if at is None else at.replace(tzinfo=at.tzinfo or UTC),
            interval=interval,
            window=timedelta(hours=window_hours),
        )
    _print(found, Console(stderr=json == "-", highlight=False))
    write_json(json, found.model_dump(mode="json"))


def check(events: Url = EMBEDDED, json: Json = None) -> None:
    """Check the guardrails of all running experiments now, and pause the arms that surely broke one.

    A server does so by itself every SLUICE_GUARDRAIL_SECONDS. Exit code 1 if an arm was paused.

    Example: sluice experiments check --events postgresql://sluice@db/events
    """
    from serving import guardrails

    with _opened(events) as (database, kept):
        breaches, _ = guardrails.check(database, kept)
    for breach in breaches:
        typer.echo(f"{breach.experiment}: arm {breach.arm} is paused. {breach.reason}", err=True)
    if not breaches:
        typer.echo("nothing to pause", err=True)
    write_json(json, {"paused": [vars(breach) for breach in breaches]})
    if breaches:
        raise typer.Exit(1)


def pause(
    experiment: Name,
    arm: ArmName,
    reason: Reason,
    events: Url = EMBEDDED,
) -> None:
    """Let the control serve an arm's units, outside the experiment, until the arm is resumed.

    Example: sluice experiments pause gates gated --reason "wrong prices"
    """
    _switch(experiment, arm, reason, events, paused=True)


def resume(
    experiment: Name,
    arm: ArmName,
    reason: Reason,
    events: Url = EMBEDDED,
) -> None:
    """Let an arm serve its units again. Results begin anew.

    Example: sluice experiments resume gates gated --reason "prices are right again"
    """
    _switch(experiment, arm, reason, events, paused=False)


def _switch(experiment: str, arm: str, reason: str, events: str, *, paused: bool) -> None:
    with _opened(events) as (_, kept):
        done = (kept.pause if paused else kept.resume)(experiment, arm, reason)
    typer.echo(f"{experiment}: arm {arm} {'is paused' if paused else 'serves again'}. {done.reason}", err=True)


@contextmanager
def _opened(url: str) -> Iterator[tuple[Database, Experiments]]:
    from ctr_models.errors import ConfigError, DataError
    from serving.database import REMEDY, Database, Unavailable
    from serving.experiments import Experiments

    database = Database(url)
    kept = Experiments(database)
    try:
        kept.refresh()
        yield database, kept
    except ConfigError as error:  # a word that this database does not know; there may be others
        where = ": ".join(filter(None, (database.name, error.where)))
        raise ConfigError(error.problem, where=where, remedy=error.remedy) from None
    except Unavailable as error:
        raise DataError(f"the database can't be used ({error})", where=database.name, remedy=REMEDY) from None
    finally:
        database.close()


def _print(found: Results, screen: object) -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(screen, Console)
    began = "not begun" if found.since is None else f"since {found.since:%Y-%m-%d %H:%M} UTC"
    screen.print(f"[bold]{found.experiment}[/] version {found.version}, {found.state}, this stage {began}")
    arms, rates = (Table(box=None, header_style="bold", pad_edge=False) for _ in range(2))  # one is too wide
    _columns(arms, "arm", "share", "units", "requests", "shown")
    _columns(rates, "arm", "clicks", "ctr", "conversions", "conversion_rate")
    for arm in found.arms:
        share = arm.role if arm.share is None else "paused" if arm.paused else f"{arm.share:.1%}"
        counts = [f"{count:,}" for count in (arm.units, arm.requests, arm.shown)]
        arms.add_row(f"{arm.name} (control)" if arm.role == "control" else arm.name, share, *counts)
        clicked = f"{arm.clicks:,}", _shown(arm.ctr)
        rates.add_row(arm.name, *clicked, f"{arm.conversions:,}", _shown(arm.conversion_rate))
    screen.print(arms)
    screen.print(rates)
    if found.estimated:
        rankings = Table(box=None, header_style="bold", pad_edge=False)
        _columns(rankings, "arm", "random order, requests", "off_policy_ctr")
        for arm in found.arms:
            own = "not enough yet" if arm.off_policy_ctr.low is None else _shown(arm.off_policy_ctr)
            rankings.add_row(arm.name, f"{arm.off_policy_requests:,}", own)
        screen.print(rankings)
    if found.effects:
        effects = Table(box=None, header_style="bold", pad_edge=False)
        _columns(effects, "arm", "metric", "difference", f"{found.interval} interval", "p", "verdict")
        for one in found.effects:
            interval = f"{one.low:+.5f} .. {one.high:+.5f}"
            effects.add_row(one.arm, one.metric, f"{one.value:+.5f}", interval, f"{one.p:.3g}", one.verdict)
        screen.print(effects)
    for rail in found.guardrails:
        screen.print(f"guardrail of {rail.arm}: {rail.state}; {rail.reason}")
    for arm in found.arms:
        if arm.paused is not None:
            screen.print(f"[yellow]{arm.name} is paused since {arm.paused_at:%Y-%m-%d %H:%M} UTC:[/] {arm.paused}")
    for problem in found.problems:
        screen.print(f"[bold red]{problem}[/]")


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="left" if name in ("arm", "metric", "verdict") else "right")


def _shown(rate: Rate) -> str:
    if rate.value is None:
        return "-"
    return f"{rate.value:.4f}" + ("" if rate.low is None else f" [{rate.low:.4f}, {rate.high:.4f}]")
