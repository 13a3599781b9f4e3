"""`treeline simulate`: the planner's own code against cost curves and drawn acceptance, at any load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treeline.errors import ConfigError

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
    noisy_neighbour: Annotated[
        float, typer.Option(min=1, help="Passes take so many times as long a quarter of the time.")
    ] = 1.0,
    drift: Annotated[float, typer.Option(min=0.1, help="Passes take so many times as long at the end.")] = 1.0,
    heavy_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests whose tokens weigh four times as much.")
    ] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a picture (PNG) here.")] = None,
) -> None:
    """Simulate policies over load: real decisions, simulated passes. Prints a Markdown table."""
    from dataclasses import asdict, replace

    from rich.console import Console
    from rich.progress import Progress

    from bench.common import write_report
    from bench.simulator.devices import measured
    from bench.simulator.devices import preset as preset_device
    from bench.simulator.load import parse_load
    from bench.simulator.report import markdown, plot, rows, run_all
    from bench.simulator.simulation import Result, Scenario
    from bench.simulator.worlds import EAGLE3_LIKE, law_from_trace

    device = measured(curves, draft_layer_ms / 1e3, draft_node_ms / 1e3) if curves else preset_device(preset)
    law = law_from_trace(trace) if trace else EAGLE3_LIKE
    if over_confidence is not None:
        law = replace(law, over_confidence=over_confidence)
    names, parsed = _policies(policies), [parse_load(load) for load in dict.fromkeys(loads.split())]
    if not names or not parsed:
        raise ConfigError("at least one policy and one load")
    scenario = Scenario(
        device, law, steps, seed, replicas, prompt_tokens, output_tokens, noisy_neighbour, drift, heavy_share
    )
    results: list[Result] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=len(names) * len(parsed))
        for result in run_all(scenario, names, parsed):
            results.append(result)
            progress.update(task, advance=1, description=f"{result.policy} at {result.load}")
    made = rows(results, parsed, names)
    typer.echo(markdown(made))
    if json_file is not None:
        config = {name: value for name, value in asdict(scenario).items() if name != "device"}
        write_report(json_file, {**config, "device": device.name}, made)
    if plot_file is not None:
        plot(plot_file, made, names, parsed, f"{device.name}, {replicas} replica(s): simulated")


def _policies(spellings: str) -> list[str]:
    from planner.policies import parse_policy

    names = list(dict.fromkeys(spellings.split()))
    for name in names:
        try:
            parse_policy(name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return names
