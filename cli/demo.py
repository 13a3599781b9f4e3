"""`treeline demo`: the whole service on real prompts, with and without speculation, in one go."""

from __future__ import annotations

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
"""Policies of the rounds that are compared (None: the default): slow spells of the machine hit both alike."""
ALONE_TURNS, TOGETHER_REPEATS = 2 * TURNS, 2
"""A round of all prompts asks each this often, so that all streams stay busy while it is measured."""
SEED = 7
WARM_UP_TOKENS = 16
"""A service that has just started pays for first calls, and its planner knows nothing yet: neither is compared."""
TIMEOUT_S = 300.0
TOKENS_BEFORE_KILL = 5


@dataclass
class Outcome:
    """One stream as its client saw it. `arrivals`: (time, tokens) of each chunk."""

    started_s: float
    ended_s: float
    arrivals: list[tuple[float, int]]
    text: str
    complete: pb.GenerateComplete
    steps: list[pb.SpeculationStep]

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0] - self.started_s

    @property
    def total_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def tokens(self) -> int:
        return self.complete.usage.completion_tokens


@dataclass
class Rounds:
    """Rounds of the same prompts: their streams, round by round; tokens and seconds while all streams were busy."""

    outcomes: list[Outcome] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, more: Rounds) -> None:
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
    # Later rounds must not find the first one's prompts computed.
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
    """Answers, trees that shrink while the load climbs, and rounds with trees and without, in turns."""
    info = client.model_info()
    policy = info.default_policy
    console.print(f"{info.model} ({info.architecture}, {info.dtype}) at {client.target}, policy {policy}\n")
    for prompt in PROMPTS:
        console.print(f"[bold]{prompt.label:>8}[/] > {escape(prompt.text.splitlines()[0])}")
    console.print("\nwarming up ...\n")
    run_round(client, PROMPTS, WARM_UP_TOKENS)
    run_round(client, PROMPTS, max_tokens, show=Narrator(console))

    console.print("\n[bold]The load climbs, and trees shrink[/] (one stream repeats a text)")
    for streams in LOADS:
        console.print(rung(run_round(client, ALONE + PROMPTS[: streams - 1], max_tokens)), highlight=False)

    console.print(f"\n[bold]{policy} and off in turns[/], {len(ALONE_TURNS)} rounds alone, {len(TURNS)} with all ...")
    alone = in_turns(client, ALONE, max_tokens, ALONE_TURNS)
    together = in_turns(client, PROMPTS, max_tokens, TURNS, TOGETHER_REPEATS)
    console.print(comparison(f"policy {policy}, and the same with off: alone", ALONE, *alone))
    console.print(comparison("all at once", PROMPTS, *together))
    for what, (trees, plain) in (("alone", alone), ("all at once", together)):
        same = sum(a.text == b.text for a, b in zip(trees.outcomes, plain.outcomes, strict=True))
        console.print(
            f"{what}: {trees.tokens_per_s:.1f} tokens/s with {policy}, {plain.tokens_per_s:.1f} without: "
            f"[bold]{trees.tokens_per_s / plain.tokens_per_s:.2f}x[/]; {same} of {len(plain.outcomes)} texts identical"
        )


def rung(load: Rounds) -> str:
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
    client: TreelineClient,
    prompts: tuple[DemoPrompt, ...],
    max_tokens: int,
    policies: tuple[str | None, ...],
    repeats: int = 1,
) -> tuple[Rounds, Rounds]:
    """Rounds of the same prompts by these policies, one after the other: those with trees, and those without."""
    with_trees, plain = Rounds(), Rounds()
    for policy in policies:
        (plain if policy else with_trees).add(run_round(client, prompts, max_tokens, policy, repeats=repeats))
    return with_trees, plain


def run_round(
    client: TreelineClient,
    prompts: tuple[DemoPrompt, ...],
    max_tokens: int,
    policy: str | None = None,
    show: Callable[[str, str], None] = silent,
    repeats: int = 1,
) -> Rounds:
    """As many streams as prompts; a stream that ends takes the next request, until each prompt was asked `repeats`
    times. What comes after a stream finds no more to take is not measured: then fewer are busy."""
    started_s = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = pool.map(lambda prompt: follow(client, prompt, max_tokens, policy, show), prompts * repeats)
        outcomes = list(asked)
    closed_s = sorted(outcome.ended_s for outcome in outcomes)[-len(prompts)]
    arrivals = [arrival for outcome in outcomes for arrival in outcome.arrivals]
    return Rounds(outcomes, sum(tokens for at_s, tokens in arrivals if at_s <= closed_s), closed_s - started_s)


def follow(
    client: TreelineClient, prompt: DemoPrompt, max_tokens: int, policy: str | None, show: Callable[[str, str], None]
) -> Outcome:
    """One stream from its request to its end."""
    started_s = time.perf_counter()
    text, complete = "", pb.GenerateComplete()
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
    for message in answer:
        if isinstance(message, pb.GenerateComplete):
            complete = message
        else:
            arrivals.append((time.perf_counter(), len(message.token_ids)))
            text += message.text
            steps.append(message.speculation)
            show(prompt.label, message.text)
    show(prompt.label, "\n")
    return Outcome(started_s, time.perf_counter(), arrivals, text, complete, steps)


def comparison(title: str, prompts: tuple[DemoPrompt, ...], with_trees: Rounds, without: Rounds) -> Table:
    """A row a prompt, over all rounds: what its client saw with trees, and without."""
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
    for number, prompt in enumerate(prompts):
        trees, plain = (rounds.outcomes[number :: len(prompts)] for rounds in (with_trees, without))
        rates = [sum(o.tokens for o in outcomes) / sum(o.total_s for o in outcomes) for outcomes in (trees, plain)]
        table.add_row(
            prompt.label + (f" T={prompt.temperature:g}" if prompt.temperature else ""),
            str(trees[-1].tokens),
            f"{mean(o.first_s for o in trees):.2f} s",
            f"{rates[0]:.1f}",
            f"{mean(o.complete.speculation.mean_tree_nodes for o in trees):.1f}",
            f"{mean(o.complete.speculation.mean_accepted_length for o in trees):.2f}",
            f"{mean(o.first_s for o in plain):.2f} s",
            f"{rates[1]:.1f}",
            f"{rates[0] / rates[1]:.2f}x",
        )
    return table
