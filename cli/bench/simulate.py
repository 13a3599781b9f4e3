"""`treeline simulate`: policies under load on a virtual clock, with the real engine and planner over fake models."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import JsonFile
from treeline.errors import ConfigError

POLICIES = "off chain:2 chain:4 eagle2:4,4,12 smart-paper smart"
LOADS = "1 8 32 64"


def simulate(
    preset: Annotated[str, typer.Option(help="MODEL@GPU, from published peak figures.")] = "llama-8b@h100",
    curves: Annotated[
        Path | None, typer.Option(help="What `treeline profile --json` printed, instead of a preset.")
    ] = None,
    draft_layer_ms: Annotated[float, typer.Option(min=0, help="With --curves: a pass of the draft model.")] = 5.0,
    draft_node_ms: Annotated[float, typer.Option(min=0, help="With --curves: a token of such a pass.")] = 0.2,
    policies: Annotated[str, typer.Option(help="Separated by spaces.")] = POLICIES,
    loads: Annotated[
        str, typer.Option(help="Separated by spaces: numbers of streams, or poisson:SHARE of plain capacity.")
    ] = LOADS,
    steps: Annotated[
        int, typer.Option(min=100, help="Each policy gets the time that so many plain steps take at each load.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same numbers.")] = 0,
    prompt_tokens: Annotated[int, typer.Option(min=32, help="Mean length of prompts.")] = 256,
    output_tokens: Annotated[int, typer.Option(min=8, help="Mean length of answers.")] = 256,
    over_confidence: Annotated[
        float | None, typer.Option(min=0.1, help="Claimed over true probability of the drafter's first choice.")
    ] = None,
    inter_token_p95_ms: Annotated[
        float | None, typer.Option(min=0.001, help="An objective: planner.objectives.inter_token_p95_ms.")
    ] = None,
    time_to_first_token_p95_ms: Annotated[
        float | None, typer.Option(min=0.001, help="An objective: planner.objectives.time_to_first_token_p95_ms.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Simulate policies over load: all decisions are real, passes and texts are made up by the curves and a law."""
    from bench.common import write_report
    from bench.simulator.acceptance import EAGLE3_LIKE
    from bench.simulator.devices import measured
    from bench.simulator.devices import preset as preset_device
    from bench.simulator.simulate import Scenario, parse_load, rows, simulate_all
    from cli.terminal import Counted
    from planner.policies import canonical_spellings
    from treeline.config import ObjectivesConfig

    device = measured(curves, draft_layer_ms / 1e3, draft_node_ms / 1e3) if curves else preset_device(preset)
    law = EAGLE3_LIKE if over_confidence is None else replace(EAGLE3_LIKE, over_confidence=over_confidence)
    objectives = ObjectivesConfig(
        inter_token_p95_ms=inter_token_p95_ms, time_to_first_token_p95_ms=time_to_first_token_p95_ms
    )
    scenario = Scenario(device, law, steps, seed, prompt_tokens, output_tokens, objectives)
    names, parsed = canonical_spellings(policies.split()), [parse_load(load) for load in dict.fromkeys(loads.split())]
    if not names or not parsed:
        raise ConfigError("at least one policy and one load")
    results = []
    with Counted("simulating") as bar:
        bar.expect(len(names) * len(parsed))
        for result in simulate_all(scenario, names, parsed):
            results.append(result)
            bar.begin(f"{result.policy} at {result.load.spec} done")
    made = rows(results, parsed, names, objectives)
    _show(device.name, made)
    config = {"device": device.name, "law": asdict(law), "steps": steps, "seed": seed}
    config |= {"objectives": objectives.model_dump(), "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    write_report(json_file, config, made)


def _show(device: str, made: list[dict[str, Any]]) -> None:
    from cli.terminal import number, show_table

    numbers = ("tokens_per_s", "speedup", "accepted_length", "tree_nodes", "ttft_ms_p50", "itl_ms_p50", "itl_ms_p95")
    columns = (*numbers, "met")
    digits = (0, 2, 2, 1, 0, 1, 1, 2)
    headings = ("load", "policy", "tokens/s", "x off", "accepted", "nodes", "TTFT p50", "ITL p50", "p95, ms", "met")
    lines = [
        [row["load"], row["policy"], *(number(row[name], d) for name, d in zip(columns, digits, strict=True))]
        for row in made
    ]
    show_table(f"{device}: simulated", headings, lines, names=2)
