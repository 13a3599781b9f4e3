"""`treeline top`: how busy a running service is, live."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from cli.options import PlaintextToken, Server, TlsCa, Token
from treeline.client import TreelineClient
from treeline.client.base import DEFAULT_SERVER
from treeline.v1 import generation_pb2 as pb


def top(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and exit.")] = False,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    tls_ca: TlsCa = None,
    plaintext_token: PlaintextToken = False,
) -> None:
    """Show load, speed and speculation of a running service until Ctrl-C."""
    console = Console()
    with TreelineClient(server, token, tls_ca, allow_plaintext_token=plaintext_token) as client:
        info = client.model_info()
        title = f"{info.model} at {server}"
        if once:
            console.print(view(title, client))
            return
        with Live(view(title, client), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(view(title, client), refresh=True)


def view(title: str, client: TreelineClient) -> Group:
    """The load of the service, and each verifier's plan."""
    return Group(load_table(title, client.load()), *map(plan_table, client.plans()))


def plan_table(plan: pb.VerifierPlan) -> Table:
    table = Table(title=f"plan {plan.version}, {plan.age_s:.1f} s old", caption=plan.reason, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("price", f"{plan.price:.1f} tokens/s")
    table.add_row("step budget", _ms(plan.step_budget_s) if plan.HasField("step_budget_s") else "none")
    table.add_row("waiting costs", f"{plan.wait_factor:.1f}-fold")
    for signal in plan.signals:
        value = _ms(signal.value_s) if signal.HasField("value_s") else "nothing fresh"
        asked = f", objective {_ms(signal.objective_s)}" if signal.HasField("objective_s") else ""
        measured = f" ({signal.source}, {signal.age_s:.1f} s old)" if signal.HasField("value_s") else ""
        table.add_row(signal.name.replace("_", " "), value + asked + measured)
    return table


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def load_table(title: str, load: pb.GetLoadResponse) -> Table:
    table = Table(title=title, show_header=False, min_width=len(title))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("running", f"{load.num_requests_running} of {load.max_requests_running}")
    table.add_row("waiting", f"{load.num_requests_waiting} of {load.max_requests_waiting}")
    table.add_row("KV blocks", f"{load.kv_blocks_used} of {load.kv_blocks_total}")
    table.add_row("tokens per second", f"{load.tokens_per_s:.1f}")
    table.add_row("mean accepted length", f"{load.mean_accepted_length:.2f}")
    table.add_row("mean tree nodes", f"{load.mean_tree_nodes:.1f}")
    table.add_row("price", f"{load.price:.1f} tokens/s")
    table.add_row("drafter", load.drafter_problem or ("ready" if load.drafter_ready else "away"))
    return table
