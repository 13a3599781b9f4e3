"""`treeline generate` and `treeline chat`: answers, streamed to the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from cli.options import PlaintextToken, Server, TlsCa, Token
from treeline.client import TreelineClient
from treeline.client.as_dict import as_dict
from treeline.client.base import DEFAULT_SERVER, Message, texts_of
from treeline.request import GenerateOptions
from treeline.v1 import generation_pb2 as pb


def generate(
    ctx: typer.Context,
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
    stop_token_ids: Annotated[
        list[int] | None, typer.Option("--stop-token-id", help="End at this token; may be repeated.")
    ] = None,
    include_stop: Annotated[bool, typer.Option("--include-stop", help="Show what ended the answer too.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    min_tokens: Annotated[int | None, typer.Option(help="Do not end before so many tokens.")] = None,
    keep_special: Annotated[
        bool, typer.Option("--keep-special-tokens", help="Show special tokens, such as the end of a turn.")
    ] = False,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probabilities, and of so many others.")] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(help="With --json: the same, of the prompt.")] = None,
    n: Annotated[int | None, typer.Option(help="How many answers.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes first; -4 to 4.")] = 0,
    max_nodes: Annotated[int | None, typer.Option(help="Most draft nodes in any step.")] = None,
    max_depth: Annotated[int | None, typer.Option(help="Deepest draft layer in any step.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="A JSON Schema that the answer must satisfy.")] = None,
    regex: Annotated[str | None, typer.Option(help="A regular expression that the answer must match.")] = None,
    lark: Annotated[str | None, typer.Option(help="A grammar in Lark's notation that the answer must match.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="A text that the answer may be; repeat for others.")] = None,
    policy: Annotated[str | None, typer.Option(help="off, chain:4, eagle2:5,4,16, smart-paper, smart, ...")] = None,
    target_time_per_output_token_ms: Annotated[
        float | None, typer.Option(help="Favour the answer while it is slower.")
    ] = None,
    begin: Annotated[str | None, typer.Option(help="What the assistant has said so far; the answer goes on.")] = None,
    template_arguments: Annotated[str | None, typer.Option(help="JSON object that the chat template reads.")] = None,
    no_generation_prompt: Annotated[
        bool, typer.Option("--no-generation-prompt", help="Do not begin the assistant's turn.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="PROMPT is token ids, separated by spaces.")] = False,
    model: Annotated[str, typer.Option(help="Refuse any other served model.", show_default=False)] = "",
    request_id: Annotated[str, typer.Option(help="Its name in logs, and to abort it.", show_default=False)] = "",
    explain: Annotated[bool, typer.Option("--explain", help="Show each step: its text, its tree, and why.")] = False,
    explain_tree: Annotated[
        bool, typer.Option("--explain-tree", help="With --json: also every node of each step's tree.")
    ] = False,
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
    is_chat = not (raw or token_ids)
    if not is_chat and (system is not None or begin is not None):
        raise typer.BadParameter("--system and --begin need a chat: leave --raw and --token-ids away")
    turns = (("system", system), ("user", text), ("assistant", begin))
    messages = [{"role": role, "content": content} for role, content in turns if content is not None]
    # Most options are named as the fields they fill.
    options = {name: value for name, value in ctx.params.items() if name in GenerateOptions.__optional_keys__}
    options |= {"skip_special_tokens": not keep_special, "logit_bias": _biases(logit_bias or [])}
    with TreelineClient(server, token, tls_ca, allow_plaintext_token=plaintext_token) as client:
        answer = client.generate(
            text if raw and not token_ids else None,
            messages=messages if is_chat else None,
            token_ids=_ids(text) if token_ids else None,
            template_arguments=_object(template_arguments),
            add_generation_prompt=False if no_generation_prompt else None,
            grammar=_grammar(json_schema, regex, lark, choice),
            timeout_s=timeout,
            **options,
        )
        show = show_json if as_json else show_steps if explain or explain_tree else show_text
        show(answer)


def chat(
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of each answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass, in (0, 1].")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answers.")] = None,
    policy: Annotated[str | None, typer.Option(help="off, chain:4, eagle2:5,4,16, smart-paper, smart, ...")] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    tls_ca: TlsCa = None,
    plaintext_token: PlaintextToken = False,
) -> None:
    """Talk with the served model, a line at a time, until the end of the input (Ctrl-D)."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    with TreelineClient(server, token, tls_ca, allow_plaintext_token=plaintext_token) as client:
        while said := _line():
            messages.append({"role": "user", "content": said})
            sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
            answer = list(_shown(client.generate(messages=messages, policy=policy, **sampling)))  # type: ignore[arg-type]
            messages.append({"role": "assistant", "content": texts_of(answer)[0]})


def _line() -> str:
    """The next line that is not empty; empty at the end of the input."""
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return ""
        if said:
            return said


def _grammar(
    json_schema: str | None, regex: str | None, lark: str | None, choice: list[str] | None
) -> pb.Grammar | None:
    given = {"json_schema": json_schema, "regex": regex, "lark": lark, "choice": choice and pb.Choice(texts=choice)}
    kinds: dict[str, Any] = {name: value for name, value in given.items() if value}
    if len(kinds) > 1:
        raise typer.BadParameter("give one of --json-schema, --regex, --lark and --choice")
    return pb.Grammar(**kinds) if kinds else None


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split()]
    except ValueError:
        raise typer.BadParameter("with --token-ids, PROMPT is numbers separated by spaces") from None


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "null")
    except ValueError:
        value = text
    if value is not None and not isinstance(value, dict):
        raise typer.BadParameter("--template-arguments is a JSON object")
    return value


def _biases(given: list[str]) -> dict[int, float]:
    """Parses entries of the form "token id:bias"."""
    try:
        return {int(token_id): float(bias) for token_id, _, bias in (entry.partition(":") for entry in given)}
    except ValueError:
        raise typer.BadParameter(f"--logit-bias is TOKEN_ID:BIAS, as in 42:-5, not {' '.join(given)}") from None


def show_text(answer: Iterator[Message]) -> None:
    """The text alone, as it comes; of several answers, those after the first once all are complete."""
    texts = texts_of(_shown(answer))
    for text in texts[1:]:
        typer.echo(f"\n{text}")


def _shown(answer: Iterator[Message]) -> Iterator[Message]:
    """The same messages. The first answer's text is printed as it comes."""
    for message in answer:
        if message.index == 0:
            typer.echo(message.text if isinstance(message, pb.GenerateChunk) else "\n", nl=False)
        yield message


def show_json(answer: Iterator[Message]) -> None:
    """{"chunk": ...} lines, then one {"complete": ...} line, fields as in generation.proto."""
    for message in answer:
        kind = "chunk" if isinstance(message, pb.GenerateChunk) else "complete"
        typer.echo(json.dumps({kind: as_dict(message)}, ensure_ascii=False))


def show_steps(answer: Iterator[Message]) -> None:
    """One line per step, then a summary."""
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
    """One line about how an answer was produced."""
    tokens, timings, speculation = complete.usage.completion_tokens, complete.timings, complete.speculation
    rate = tokens / timings.total_s if timings.total_s else 0.0
    return (
        f"{tokens} tokens in {timings.total_s:.2f} s ({rate:.1f} tokens/s), first after "
        f"{timings.time_to_first_token_s:.2f} s; policy {complete.policy}: {speculation.mean_tree_nodes:.1f} nodes and "
        f"{speculation.mean_accepted_length:.2f} tokens a step; seed {complete.seed}"
    )
