"""`treeline generate`: one answer, streamed to the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from cli.options import DEFAULT_SERVER, PlaintextToken, Server, TlsCa, Token
from treeline.client import TreelineClient
from treeline.client.as_dict import as_dict
from treeline.v1 import generation_pb2 as pb


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say; - reads it from standard input.")],
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, the default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass, in (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 or -1 keeps all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens rarer than this times the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Over 1: repeat less of prompt and answer.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Taken off the logits of tokens used.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Taken off for each time they were used.")] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN_ID:BIAS", help="Added to a token's logit; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="End at this token; may be repeated.")] = None,
    include_stop: Annotated[bool, typer.Option("--include-stop", help="Show what ended the answer too.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    min_tokens: Annotated[int | None, typer.Option(help="Do not end before so many tokens.")] = None,
    keep_special: Annotated[
        bool, typer.Option("--keep-special-tokens", help="Show special tokens, such as the end of a turn.")
    ] = False,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probabilities, and of so many others.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes first; -4 to 4.")] = 0,
    max_nodes: Annotated[int | None, typer.Option(help="Most draft nodes in any step.")] = None,
    max_depth: Annotated[int | None, typer.Option(help="Deepest draft layer in any step.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="A JSON Schema that the answer must satisfy.")] = None,
    regex: Annotated[str | None, typer.Option(help="A regular expression that the answer must match.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="A text that the answer may be; repeat for others.")] = None,
    policy: Annotated[str | None, typer.Option(help="off, chain:4, eagle2:5,4,16, smart-paper, smart, ...")] = None,
    target_ms: Annotated[
        float | None, typer.Option("--target-time-per-output-token-ms", help="Favour the answer while it is slower.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show each step: its text, its tree, and why.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each message as one line of JSON.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds the whole answer may take.")] = None,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    tls_ca: TlsCa = None,
    plaintext_token: PlaintextToken = False,
) -> None:
    """Stream an answer from a running service (see `treeline serve`).

    Ctrl-C ends the request on the service too.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if raw and system is not None:
        raise typer.BadParameter("--system needs a chat: leave --raw away")
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    with TreelineClient(server, token, tls_ca, allow_plaintext_token=plaintext_token) as client:
        answer = client.generate(
            text if raw else None,
            messages=None if raw else messages,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=_biases(logit_bias or []),
            seed=seed,
            stop=stop or (),
            stop_token_ids=stop_token_id or (),
            include_stop=include_stop,
            ignore_eos=ignore_eos,
            min_tokens=min_tokens,
            skip_special_tokens=not keep_special,
            logprobs=logprobs,
            priority=priority,
            grammar=_grammar(json_schema, regex, choice),
            max_nodes=max_nodes,
            max_depth=max_depth,
            policy=policy,
            target_time_per_output_token_ms=target_ms,
            explain=explain,
            timeout_s=timeout,
        )
        show = show_json if as_json else show_steps if explain else show_text
        show(answer)


def _grammar(json_schema: str | None, regex: str | None, choice: list[str] | None) -> pb.Grammar | None:
    if sum(map(bool, (json_schema, regex, choice))) > 1:
        raise typer.BadParameter("give one of --json-schema, --regex and --choice")
    choices = pb.Choice(texts=choice) if choice else None
    return pb.Grammar(json_schema=json_schema, regex=regex, choice=choices) if json_schema or regex or choice else None


def _biases(given: list[str]) -> dict[int, float]:
    """From "token id:bias" each."""
    try:
        return {int(token_id): float(bias) for token_id, _, bias in (entry.partition(":") for entry in given)}
    except ValueError:
        raise typer.BadParameter(f"--logit-bias is TOKEN_ID:BIAS, as in 42:-5, not {' '.join(given)}") from None


def show_text(answer: Iterator[pb.GenerateChunk | pb.GenerateComplete]) -> None:
    """The text alone, as it comes."""
    for message in answer:
        if isinstance(message, pb.GenerateChunk):
            typer.echo(message.text, nl=False)
        else:
            typer.echo()


def show_json(answer: Iterator[pb.GenerateChunk | pb.GenerateComplete]) -> None:
    """{"chunk": ...} lines, then one {"complete": ...} line, fields as in generation.proto."""
    for message in answer:
        kind = "chunk" if isinstance(message, pb.GenerateChunk) else "complete"
        typer.echo(json.dumps({kind: as_dict(message)}, ensure_ascii=False))


def show_steps(answer: Iterator[pb.GenerateChunk | pb.GenerateComplete]) -> None:
    """One line a step, then a summary."""
    for message in answer:
        if isinstance(message, pb.GenerateChunk):
            step = message.speculation
            typer.echo(
                f"{message.text!r:<32} drafted {step.drafted_nodes:>2}, verified {step.verified_nodes:>2}, "
                f"accepted {step.accepted_nodes:>2} | {step.step_s * 1e3:.1f} ms, price {step.price:.0f} tokens/s, "
                f"plan {step.plan_version} | {step.reason}"
            )
        else:
            typer.echo(summary(message))


def summary(complete: pb.GenerateComplete) -> str:
    """One line: how an answer came about."""
    tokens, timings, speculation = complete.usage.completion_tokens, complete.timings, complete.speculation
    rate = tokens / timings.total_s if timings.total_s else 0.0
    return (
        f"{tokens} tokens in {timings.total_s:.2f} s ({rate:.1f} tokens/s), first after "
        f"{timings.time_to_first_token_s:.2f} s; policy {complete.policy}: {speculation.mean_tree_nodes:.1f} nodes and "
        f"{speculation.mean_accepted_length:.2f} tokens a step; seed {complete.seed}"
    )
