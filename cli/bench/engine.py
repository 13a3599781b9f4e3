"""`treeline bench engine`: step overhead outside the models, waits behind a long prompt, memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfigFile, JsonFile, Limit, Prompts, numbers
from treeline.config import Config, load_config
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from bench.engine import EngineRow, Overhead
    from bench.memory import Memory
    from bench.stall import StallRow

STREAMS = 8
"""That run when the long prompt arrives."""
LEAST_ANSWER_TOKENS = 64


def engine(
    config: ConfigFile = None,
    sequences: Annotated[str, typer.Option(help="Running requests.")] = "1 8 16",
    policies: Annotated[str, typer.Option(help="Separated by spaces.")] = "off smart",
    steps: Annotated[int, typer.Option(min=2, help="Steps to take apart, of each policy at each load.")] = 60,
    long_prompt: Annotated[int, typer.Option(min=16, help="Tokens of the prompt that arrives late.")] = 900,
    rounds: Annotated[int, typer.Option(min=1, help="How often it arrives.")] = 3,
    prompts: Prompts = None,
    limit: Limit = None,
    json_file: JsonFile = None,
) -> None:
    """Take the steps of the real engine apart, let a long prompt arrive while 8 streams run, look at the memory.

    The step overhead is all that is neither a pass of the drafter nor of the target. Waits are told in decode steps.
    """
    from dataclasses import asdict

    from bench.common import write_report

    loaded, asked = load_config(config), _policies(policies)
    counts = numbers("--sequences", sequences, int)
    if not counts:
        raise ConfigError("--sequences: give at least one number of requests")
    measured = _measure(loaded, asked, list(counts), steps, long_prompt, rounds, prompts, limit)
    rows, overheads, stalls, memory = measured
    _show(rows, overheads, stalls, memory)
    if json_file is not None:
        described = {"config": loaded.model_dump(mode="json"), "policies": asked, "steps": steps, "rounds": rounds}
        more = {
            "overhead": [asdict(overhead) for overhead in overheads],
            "long_prompt": [asdict(stall) for stall in stalls],
            "memory": asdict(memory),
        }
        write_report(json_file, described, [asdict(row) for row in rows], **more)


def _policies(spellings: str) -> list[str]:
    from planner.policies import canonical_spellings

    policies = canonical_spellings(spellings.split())
    if not policies:
        raise ConfigError("--policies: give at least one policy")
    return list(policies)


def _measure(
    config: Config,
    policies: list[str],
    counts: list[int],
    steps: int,
    long_prompt: int,
    rounds: int,
    prompts: Path | None,
    limit: int | None,
) -> tuple[list[EngineRow], list[Overhead], list[StallRow], Memory]:
    from bench.common import OWN_PROMPTS, load_prompts
    from bench.engine import run_engine
    from bench.local_engine import PlannedEngine, encode
    from bench.memory import measure_memory
    from bench.stall import long_text, run_stall
    from bench.systems import with_room
    from cli.shown import Counted
    from lm.model import LanguageModel
    from lm.store import load_tokenizer, resolve_model
    from verifier_svc.service.profile_cache import verification_profile

    texts = load_prompts(prompts or OWN_PROMPTS, limit)
    with Counted("memory") as bar:
        bar.expect(2 + len(counts) * len(policies) + rounds * len(policies))
        tokenizer = load_tokenizer(resolve_model(config.verifier.target.model))
        encoded = [encode(tokenizer, prompt) for prompt in texts]
        late = long_text(encoded, long_prompt)
        lengths = {f"{index}": len(ids) for index, ids in enumerate([*encoded, late])}
        answer_tokens = max(LEAST_ANSWER_TOKENS, config.limits.max_context_tokens - max(lengths.values()))
        roomy = with_room(config, lengths, max(*counts, STREAMS + 1), answer_tokens)
        bar.begin("memory")
        memory = measure_memory(config, [*encoded[: config.limits.max_running_requests], late])
        bar.begin("loading")
        model = LanguageModel.load(config.verifier.target)
        profiled = model.new_cache(config.verifier.kv_cache_tokens, config.verifier.kv_block_tokens)
        curves = verification_profile(model, profiled)
        del profiled
        planned = PlannedEngine(model, roomy, curves)
        rows, overheads = run_engine(planned, encoded, policies, counts, steps, answer_tokens, bar.begin)
        stalls = run_stall(planned, encoded, late, policies, STREAMS, rounds, answer_tokens, bar.begin)
    return rows, overheads, stalls, memory


def _show(rows: list[EngineRow], overheads: list[Overhead], stalls: list[StallRow], memory: Memory) -> None:
    from rich.console import Console

    from cli.shown import number, table

    console = Console()
    for count in dict.fromkeys(row.sequences for row in rows):
        phases: dict[str, list[str]] = {}
        for row in rows:
            if row.sequences == count:
                phases.setdefault(row.phase, [row.phase]).extend((number(row.ms, 2), number(100 * row.share)))
        policies = dict.fromkeys(row.policy for row in rows)
        headings = [heading for policy in policies for heading in (f"{policy}, ms", "%")]
        console.print(table(f"{count} sequences: where a step's time goes", ["phase", *headings], phases.values()))
    console.print(
        table(
            "outside the models' passes",
            ["policy", "sequences", "step, ms", "nodes", "all, %", "without\nsampling, %", "planner\napart, ms"],
            (
                [
                    row.policy,
                    str(row.sequences),
                    number(row.step_ms),
                    number(row.verified_nodes),
                    number(100 * row.outside_models_share),
                    number(100 * row.bookkeeping_share),
                    number(row.planner_ms, 2),
                ]
                for row in overheads
            ),
        )
    )
    for stall in stalls:
        console.print(
            f"{stall.policy}: while {stall.prompt_tokens} tokens arrive, {stall.streams} streams wait at most "
            f"{stall.longest_wait_steps:.1f} decode steps ({stall.longest_wait_steps_min:.1f}-"
            f"{stall.longest_wait_steps_max:.1f}) of {stall.decode_step_ms:.0f} ms; the first token comes after "
            f"{stall.ttft_ms:.0f} ms, {stall.prompt_steps:.0f} steps",
            highlight=False,
        )
    console.print(
        f"memory: {memory.peak_mb:.0f} MB at most, {memory.loaded_mb:.0f} when loaded, {memory.python_mb:.0f} without "
        f"a model; target {memory.target_mb:.0f} (weights {memory.weights_mb:.0f}, KV pool {memory.kv_pool_mb:.0f})",
        highlight=False,
    )
