"""`treeline simulate`: the planner's own code against cost curves and drawn acceptance, at any load."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.simulator.conditions import CONDITIONS
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from bench.simulator.load import Load
    from bench.simulator.simulation import Result, Scenario
    from bench.simulator.worlds import AcceptanceLaw

POLICIES = "off chain:4 eagle2:4,4,12 eagle2:6,10,60 sequoia:16,6 smartspec vllm-adaptive smart-paper smart"
LOADS = "1 2 4 8 16 32 64"


def simulate(
    preset: Annotated[str, typer.Option(help="MODEL@GPU, from published peak figures.")] = "llama-8b@h100",
    curves: Annotated[
        Path | None, typer.Option(help="What `treeline profile --json` printed, instead of a preset.")
    ] = None,
    draft_layer_ms: Annotated[float, typer.Option(min=0, help="With --curves: a layer of the draft model.")] = 5.0,
    draft_node_ms: Annotated[float, typer.Option(min=0, help="With --curves: a node of a layer.")] = 0.2,
    policies: Annotated[str, typer.Option(help="Separated by spaces.")] = POLICIES,
    loads: Annotated[
        str,
        typer.Option(
            help="Separated by spaces: streams per replica, or poisson:, bursty: or diurnal: with the share of plain "
            "decoding's capacity that arrives."
        ),
    ] = LOADS,
    steps: Annotated[int, typer.Option(min=100, help="Verification steps, over all policies and loads.")] = 1_000_000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same numbers.")] = 0,
    replicas: Annotated[int, typer.Option(min=1, max=10_000, help="Verifiers, each with a drafter.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=32, help="Mean length of prompts.")] = 256,
    output_tokens: Annotated[int, typer.Option(min=8, help="Mean length of answers.")] = 256,
    trace: Annotated[
        Path | None, typer.Option(help="Take acceptance from a trace that `treeline bench sweep --trace` wrote.")
    ] = None,
    over_confidence: Annotated[
        float | None, typer.Option(min=0.1, help="The drafter claims so many times the true probability.")
    ] = None,
    conditions: Annotated[
        str, typer.Option(help="What disturbs it, separated by spaces: " + ", ".join(CONDITIONS) + ".")
    ] = "steady",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a picture (PNG) here.")] = None,
) -> None:
    """Simulate policies over load: real decisions, simulated passes. Prints Markdown tables."""
    from bench.simulator.devices import measured
    from bench.simulator.devices import preset as preset_device
    from bench.simulator.load import parse_load
    from bench.simulator.simulation import Scenario
    from planner.policies import canonical_spellings

    device = measured(curves, draft_layer_ms / 1e3, draft_node_ms / 1e3) if curves else preset_device(preset)
    law = _law(trace, over_confidence)
    scenario = Scenario(device, law, steps, seed, replicas, prompt_tokens, output_tokens)
    names, parsed = canonical_spellings(policies.split()), [parse_load(load) for load in dict.fromkeys(loads.split())]
    disturbed = list(dict.fromkeys(conditions.split()))
    if not names or not parsed or not disturbed:
        raise ConfigError("at least one policy, one load and one kind of conditions")
    made = _run(scenario, names, parsed, disturbed)
    _report(made, disturbed)
    if json_file is not None:
        from bench.common import write_report

        config = {name: value for name, value in asdict(scenario).items() if name not in ("device", "conditions")}
        write_report(json_file, {**config, "device": device.name}, made)
    if plot_file is not None:
        from bench.simulator.report import plot

        first = [row for row in made if row["conditions"] == disturbed[0]]
        plot(plot_file, first, names, parsed, f"{device.name}, {replicas} replica(s), {disturbed[0]}: simulated")


def _run(
    scenario: Scenario, policies: tuple[str, ...], loads: list[Load], conditions: list[str]
) -> list[dict[str, Any]]:
    """All cells, with progress: rows in the order asked for, each with its conditions."""
    from rich.console import Console
    from rich.progress import Progress

    from bench.simulator.conditions import parse_conditions
    from bench.simulator.report import rows, run_all

    results: dict[str, list[Result]] = {name: [] for name in conditions}
    for name in conditions:
        parse_conditions(name)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=len(policies) * len(loads) * len(conditions))
        for name, result in run_all(scenario, policies, loads, conditions):
            results[name].append(result)
            progress.update(task, advance=1, description=f"{result.policy} at {result.load}, {name}")
    return [{"conditions": name, **row} for name in conditions for row in rows(results[name], loads, policies)]


def _report(made: list[dict[str, Any]], conditions: list[str]) -> None:
    from bench.simulator.report import markdown, steps_per_s, summary

    for name in conditions:
        heading = f"Conditions: {name}\n\n" if len(conditions) > 1 else ""
        typer.echo(heading + markdown([row for row in made if row["conditions"] == name]) + "\n")
    if compared := summary(made):
        typer.echo(compared + "\n")
    typer.echo("Simulated steps per second of processor time:\n\n" + steps_per_s(made))


def _law(trace: Path | None, over_confidence: float | None) -> AcceptanceLaw:
    from bench.simulator.worlds import EAGLE3_LIKE, law_from_trace

    law = law_from_trace(trace) if trace else EAGLE3_LIKE
    return law if over_confidence is None else replace(law, over_confidence=over_confidence)
