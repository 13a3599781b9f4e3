"""`treeline demo`: the whole service on real prompts, with and without speculation, in one go."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.options import ConfigFile
from cli.serve import check_startable
from cli.terminal import Narrator
from treeline.client import TreelineClient
from treeline.config_file import load_config
from treeline.rpc.tokens import read_tokens
from treeline.v1 import generation_pb2 as pb

PASSAGE = (
    "The harbour of Kilmory was built in 1823 for the herring fleet. At its height, two hundred boats landed their "
    "catch there each week, and the curing yards employed half of the town. When the herring left in 1911, the boats "
    "left with them, and the yards closed one by one. Today the harbour shelters eleven sailing boats and one ferry, "
    "and the last curing yard is a museum."
)
CODE = """def mean(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)
"""


@dataclass(frozen=True)
class DemoPrompt:
    label: str
    text: str
    temperature: float = 0.0


PROMPTS = (
    DemoPrompt("chat", "What makes the sky blue? Answer in three sentences."),
    DemoPrompt("advice", "Give me four short tips for sleeping better."),
    DemoPrompt("summary", f"Summarise this text in two sentences, in its own words:\n\n{PASSAGE}"),
    DemoPrompt("repeat", f"Repeat this text word for word:\n\n{PASSAGE}"),
    DemoPrompt("code", f"Rename the variable total to result in this function and print the whole function:\n\n{CODE}"),
    DemoPrompt("list", "Count from one to thirty in words, separated by commas."),
    DemoPrompt("story", "Begin a story about a lighthouse keeper who finds a letter.", temperature=0.8),
)
ALONE = tuple(prompt for prompt in PROMPTS if prompt.label == "repeat")
LOADS = (1, 2, 4, 7)
"""Streams at once while the load climbs."""
TURNS = (None, "off", "off", None)
"""Policies of the turns that are compared (None: the default): slow spells of the machine hit both alike."""
ALONE_S, TOGETHER_S = 3.0, 8.0
"""Of a turn: some answers of each stream, and a demo of 90 seconds."""
SEED = 7
WARM_UP_TOKENS = 16
"""A new service pays for first calls, and its planner has learnt nothing yet: neither is part of the comparison."""
TIMEOUT_S = 300.0
TOKENS_BEFORE_KILL = 5


@dataclass
class Outcome:
    """One stream as its client saw it. `arrivals`: (time, tokens) of each chunk; `complete`: None if it was cut."""

    label: str
    started_s: float
    ended_s: float
    arrivals: list[tuple[float, int]]
    text: str
    complete: pb.GenerateComplete | None
    steps: list[pb.SpeculationStep]

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0] - self.started_s

    @property
    def total_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.arrivals)


@dataclass
class Load:
    """Streams, and the tokens and seconds while all were busy."""

    outcomes: list[Outcome] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, more: Load) -> None:
        self.outcomes += more.outcomes
        self.tokens += more.tokens
        self.seconds += more.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def silent(label: str, text: str) -> None:
    """Shows nothing."""


def demo(
    config: ConfigFile = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each answer.")] = 64,
    kill: Annotated[bool, typer.Option("--kill", help="Kill a verifier in the middle of an answer instead.")] = False,
) -> None:
    """Start the service, stream answers, let the load climb, compare with plain decoding, stop."""
    console = Console()
    loaded = load_config(config)
    # Later rounds must not reuse the first one's prefill.
    verifier = loaded.verifier.model_copy(update={"prefix_caching": False})
    metrics = loaded.metrics.model_copy(update={"prometheus": "auto"})
    checked = loaded.model_copy(update={"verifier": verifier, "metrics": metrics})
    check_startable(checked)
    console.print("starting the services on Ray Serve ...")
    from deploy.run import run

    app = run(checked, block=False, report=lambda phase: console.print(f"  {phase}", highlight=False))
    try:
        server = checked.server
        token = read_tokens(server.token_file)[0] if server.token_file else None
        tls_ca = server.tls.certificate if server.tls else None
        with TreelineClient(app.endpoint, token, tls_ca, allow_plaintext_token=server.allow_insecure) as client:
            if kill:
                show_kill(client, console, max_tokens, app.kill_verifier)
            else:
                if server.page:
                    console.print(f"\n[bold]watch the trees grow at {server.page}[/]\n")
                show_demo(client, console, max_tokens)
    finally:
        app.stop()


def show_demo(client: TreelineClient, console: Console, max_tokens: int) -> None:
    """Answers, trees that shrink while the load climbs, and turns with trees and without."""
    info = client.model_info()
    policy = info.default_policy
    console.print(f"{info.model} ({info.architecture}, {info.dtype}) at {client.target}, policy {policy}\n")
    for prompt in PROMPTS:
        console.print(f"[bold]{prompt.label:>8}[/] > {escape(prompt.text.splitlines()[0])}")
    console.print("\nwarming up ...\n")
    run_round(client, PROMPTS, WARM_UP_TOKENS)
    run_round(client, PROMPTS, max_tokens, Narrator(console))

    console.print("\n[bold]The load climbs, and trees shrink[/] (one stream repeats a text)")
    for streams in LOADS:
        console.print(rung(run_round(client, ALONE + PROMPTS[: streams - 1], max_tokens)), highlight=False)

    seconds = f"{ALONE_S:g} s each alone, {TOGETHER_S:g} s with all"
    console.print(f"\n[bold]{policy} and off in turns[/], {len(TURNS)} of {seconds} ...", highlight=False)
    alone = in_turns(client, ALONE, max_tokens, ALONE_S)
    together = in_turns(client, PROMPTS, max_tokens, TOGETHER_S)
    console.print(comparison(f"policy {policy}, and the same with off: alone", ALONE, *alone))
    console.print(comparison("all at once", PROMPTS, *together))
    for what, (trees, plain) in (("alone", alone), ("all at once", together)):
        expected = {outcome.label: outcome.text for outcome in plain.outcomes}
        same = sum(outcome.text == expected[outcome.label] for outcome in trees.outcomes)
        console.print(
            f"{what}: {trees.tokens_per_s:.1f} tokens/s with {policy}, {plain.tokens_per_s:.1f} without: "
            f"[bold]{trees.tokens_per_s / plain.tokens_per_s:.2f}x[/]; {same} of {len(trees.outcomes)} texts identical"
        )


def rung(load: Load) -> str:
    """One load in one line: what all streams got together, and what their trees were like."""
    steps = [step for outcome in load.outcomes for step in outcome.steps]
    price = median([step.price for step in steps if step.price] or [0])
    nodes, accepted = mean(step.verified_nodes for step in steps), mean(step.accepted_nodes for step in steps)
    streams = f"{len(load.outcomes):>2} streams: {load.tokens_per_s:5.1f} tokens/s"
    return f"{streams}, price {price:3.0f}, {nodes:3.1f} nodes a tree, {accepted:3.1f} accepted"


def show_kill(client: TreelineClient, console: Console, max_tokens: int, kill: Callable[[], None]) -> None:
    """One answer twice: undisturbed, and with its verifier killed after its first tokens."""
    prompt = PROMPTS[0]
    expected = follow(client, prompt, max_tokens, None, silent).text
    arrivals: list[float] = []

    def show(label: str, text: str) -> None:
        arrivals.append(time.perf_counter())
        console.print(escape(text), end="", highlight=False)
        if len(arrivals) == TOKENS_BEFORE_KILL:
            kill()
            console.print("[bold red]<killed>[/] ", end="")

    text = follow(client, prompt, max_tokens, None, show).text
    gap_s = max(after - before for before, after in pairwise(arrivals))
    same = "the same text as" if text == expected else "ANOTHER TEXT than"
    console.print(
        f"\nA verifier was killed in mid-answer. After {gap_s:.1f} s the answer went on: {same} without the kill."
    )


def in_turns(
    client: TreelineClient, prompts: tuple[DemoPrompt, ...], max_tokens: int, seconds: float
) -> tuple[Load, Load]:
    """TURNS of so many seconds each: those with trees, and those without."""
    with_trees, plain = Load(), Load()
    for policy in TURNS:
        (plain if policy else with_trees).add(run_turn(client, prompts, max_tokens, policy, seconds))
    return with_trees, plain


def run_round(
    client: TreelineClient, prompts: tuple[DemoPrompt, ...], max_tokens: int, show: Callable[[str, str], None] = silent
) -> Load:
    """Each prompt once, all at the same time. Measured until the first stream ends."""
    started_s = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        outcomes = list(pool.map(lambda prompt: follow(client, prompt, max_tokens, None, show), prompts))
    return measured(outcomes, started_s, min(outcome.ended_s for outcome in outcomes))


def run_turn(
    client: TreelineClient, prompts: tuple[DemoPrompt, ...], max_tokens: int, policy: str | None, seconds: float
) -> Load:
    """A stream for each prompt, which asks again as soon as it has its answer; its first one is never cut."""
    started_s = time.perf_counter()
    until_s = started_s + seconds

    def ask(prompt: DemoPrompt) -> list[Outcome]:
        outcomes = [follow(client, prompt, max_tokens, policy, silent)]
        while time.perf_counter() < until_s:
            outcomes.append(follow(client, prompt, max_tokens, policy, silent, until_s))
        return outcomes

    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = [outcome for outcomes in pool.map(ask, prompts) for outcome in outcomes]
    return measured(asked, started_s, until_s)


def measured(outcomes: list[Outcome], started_s: float, until_s: float) -> Load:
    """The whole answers, and the tokens of all that came in this time."""
    arrivals = [arrival for outcome in outcomes for arrival in outcome.arrivals]
    tokens = sum(tokens for at_s, tokens in arrivals if at_s <= until_s)
    return Load([outcome for outcome in outcomes if outcome.complete is not None], tokens, until_s - started_s)


def follow(
    client: TreelineClient,
    prompt: DemoPrompt,
    max_tokens: int,
    policy: str | None,
    show: Callable[[str, str], None],
    until_s: float = math.inf,
) -> Outcome:
    """One stream from its request to its end, or cut at `until_s`."""
    started_s = time.perf_counter()
    text, complete = "", None
    arrivals: list[tuple[float, int]] = []
    steps: list[pb.SpeculationStep] = []
    answer = client.generate(
        messages=[{"role": "user", "content": prompt.text}],
        max_tokens=max_tokens,
        temperature=prompt.temperature,
        seed=SEED,
        policy=policy,
        explain=True,
        timeout_s=TIMEOUT_S,
    )
    with contextlib.closing(answer):
        for message in answer:
            if isinstance(message, pb.GenerateComplete):
                complete = message
            else:
                arrivals.append((time.perf_counter(), len(message.token_ids)))
                text += message.text
                steps.append(message.speculation)
                show(prompt.label, message.text)
            if time.perf_counter() > until_s:
                break
    show(prompt.label, "\n")
    return Outcome(prompt.label, started_s, time.perf_counter(), arrivals, text, complete, steps)


def comparison(title: str, prompts: tuple[DemoPrompt, ...], with_trees: Load, without: Load) -> Table:
    """One row per prompt, over all its answers: what its client saw with trees, and without."""
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("request", no_wrap=True)
    for heading in (
        "tokens",
        "first\ntoken",
        "tokens\n/s",
        "mean\ntree",
        "mean\naccepted",
        "off:\nfirst\ntoken",
        "off:\ntokens\n/s",
        "ratio",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for prompt in prompts:
        trees, plain = ([o for o in load.outcomes if o.label == prompt.label] for load in (with_trees, without))
        told = [o.complete.speculation for o in trees if o.complete is not None]
        rates = [sum(o.tokens for o in outcomes) / sum(o.total_s for o in outcomes) for outcomes in (trees, plain)]
        table.add_row(
            prompt.label + (f" T={prompt.temperature:g}" if prompt.temperature else ""),
            str(trees[-1].tokens),
            f"{mean(o.first_s for o in trees):.2f} s",
            f"{rates[0]:.1f}",
            f"{mean(s.mean_tree_nodes for s in told):.1f}",
            f"{mean(s.mean_accepted_length for s in told):.2f}",
            f"{mean(o.first_s for o in plain):.2f} s",
            f"{rates[1]:.1f}",
            f"{rates[0] / rates[1]:.2f}x",
        )
    return table
