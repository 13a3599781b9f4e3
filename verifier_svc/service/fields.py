"""Checks of single fields of a request: each reads a field, and notes what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from google.protobuf.message import Message

from planner.policies import parse_policy
from treeline.config import LimitsConfig, VerifierConfig
from treeline.errors import FieldViolation, InvalidRequestError
from treeline.sampling import SamplingParams
from treeline.v1 import generation_pb2 as pb
from verifier_svc.service.chat import ROLES, Chat, Prompt

MAX_POLICY_CHARS = 64
"""Longer than any spelling."""
CHARACTERS_PER_TOKEN = 32
"""Most that a whole prompt averages. Prose has 4 to 5; only runs of one character, such as spaces, come near."""
GREEDY_BELOW, MAX_TEMPERATURE = 0.01, 100.0
"""Below GREEDY_BELOW, sampling differs from greedy only where two logits nearly tie."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_PENALTY, MAX_LOGIT_BIAS, MAX_LOGIT_BIASES = 2.0, 100.0, 300
"""As in OpenAI's API."""
MAX_VIOLATIONS = 16
"""In one error: it travels in HTTP/2 trailers, which peers limit to a few kilobytes."""

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class ServedModel:
    """The target as clients see it.

    Attributes:
        max_context_tokens: of prompt and output together.
        tool_call_format: see `chat.tool_call_format`.
        sampling: defaults of the SamplingParams fields that a request leaves unset.
    """

    name: str
    architecture: str
    dtype: str
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: frozenset[int]
    has_chat_template: bool
    tool_call_format: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)


class Checker:
    """Collects violations, so that a client sees all of them at once."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def that(self, holds: bool, field: str, problem: str) -> bool:
        if not holds:
            self._violations.append(FieldViolation(field, problem))
        return holds

    def done(self) -> None:
        if self._violations:
            raise InvalidRequestError(*self._violations[:MAX_VIOLATIONS])


def prompt_of(check: Checker, request: pb.GenerateRequest | pb.TokenizeRequest, info: ServedModel) -> Prompt:
    kind = request.WhichOneof("input")
    if kind == "prompt":
        check.that(bool(request.prompt), "prompt", "is empty")
        _check_characters(check, "prompt", len(request.prompt), info)
        return request.prompt
    if kind == "chat":
        return _chat(check, request.chat, info)
    if kind == "token_ids" and isinstance(request, pb.GenerateRequest):
        ids = request.token_ids.ids
        check.that(len(ids) > 0, "token_ids.ids", "is empty")
        if check.that(len(ids) < info.max_context_tokens, "token_ids.ids", too_long(len(ids), info)):
            return known_token_ids(check, "token_ids.ids", ids, info)
        return []
    check.that(False, "input", "give one of " + ", ".join(f.name for f in request.DESCRIPTOR.oneofs[0].fields))
    return ""


def _chat(check: Checker, chat: pb.Chat, info: ServedModel) -> Chat:
    messages = chat.messages
    check.that(info.has_chat_template, "chat", f"model {info.name!r} has no chat template; send a prompt")
    check.that(len(messages) > 0, "chat.messages", "is empty")
    characters = sum(len(message.content) + len(message.fields) for message in messages)
    _check_characters(check, "chat.messages", characters + len(chat.template_arguments), info)
    for index, message in enumerate(messages[:MAX_VIOLATIONS]):
        field = f"chat.messages[{index}]"
        problem = f"is {quoted(message.role)}, must be one of {', '.join(ROLES)}"
        check.that(message.role in ROLES, f"{field}.role", problem)
        check.that(message.role != "user" or bool(message.content), f"{field}.content", "is empty")
    more = [_object(check, f"chat.messages[{index}].fields", m.fields) for index, m in enumerate(messages)]
    return Chat(
        [{**fields, "role": m.role, "content": m.content} for m, fields in zip(messages, more, strict=True)],
        _object(check, "chat.template_arguments", chat.template_arguments),
        chat.continue_final_message if chat.HasField("continue_final_message") else None,
        chat.add_generation_prompt if chat.HasField("add_generation_prompt") else None,
    )


def _object(check: Checker, field: str, text: str) -> dict[str, Any]:
    """The JSON object in `text`; empty for no text. Half a surrogate pair, which JSON can spell, is refused."""
    try:
        value = json.loads(text or "{}")
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = None
    return value if check.that(isinstance(value, dict), field, "is no JSON object") else {}


def _check_characters(check: Checker, field: str, characters: int, info: ServedModel) -> None:
    """Refuse text that cannot fit the context, before the tokeniser spends seconds on it."""
    most = info.max_context_tokens * CHARACTERS_PER_TOKEN
    problem = f"has {characters} characters; a context of {info.max_context_tokens} tokens holds at most {most}"
    check.that(characters <= most, field, problem)


def known_token_ids(check: Checker, field: str, ids: Sequence[int], info: ServedModel) -> list[int]:
    wrong = next((index for index, token_id in enumerate(ids) if token_id >= info.vocab_size), None)
    if wrong is not None:
        problem = f"is {ids[wrong]}, outside the vocabulary of {info.vocab_size} tokens"
        check.that(False, f"{field}[{wrong}]", problem)
    return list(ids)


def delivered_of(check: Checker, request: pb.GenerateRequest, info: ServedModel) -> tuple[int, ...]:
    """The tokens that were delivered before; of several answers, those of the longest one."""
    answers = [request.resume.token_ids, *(answer.token_ids for answer in request.resume.answers)]
    field = "resume.answers" if request.resume.answers else "resume"
    return max((tuple(known_token_ids(check, f"{field}.token_ids", ids, info)) for ids in answers), key=len)


def sampling_of(check: Checker, given: pb.SamplingParams, info: ServedModel) -> SamplingParams:
    sampling = pb.SamplingParams(**vars(info.sampling))
    sampling.MergeFrom(given)

    def within(name: str, low: float, high: float) -> float:
        value: float = getattr(sampling, name)
        check.that(low <= value <= high, f"sampling.{name}", f"is {value}, must lie in [{low}, {high}]")
        return value

    temperature = within("temperature", 0.0, MAX_TEMPERATURE)
    top_p, top_k = sampling.top_p, sampling.top_k
    check.that(0 < top_p <= 1, "sampling.top_p", f"is {top_p}, must lie in (0, 1]")
    check.that(top_k >= -1, "sampling.top_k", f"is {top_k}, must be 0 or -1 (all tokens) or more")
    return SamplingParams(
        0.0 if temperature < GREEDY_BELOW else temperature,
        top_p,
        min(max(top_k, 0), info.vocab_size),
        within("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        sampling.seed,
        within("presence_penalty", -MAX_PENALTY, MAX_PENALTY),
        within("frequency_penalty", -MAX_PENALTY, MAX_PENALTY),
        within("min_p", 0.0, 1.0),
        _logit_bias(check, sampling.logit_bias, info),
    )


def _logit_bias(check: Checker, bias: Mapping[int, float], info: ServedModel) -> dict[int, float]:
    problem = f"has {len(bias)} entries, at most {MAX_LOGIT_BIASES} are allowed"
    check.that(len(bias) <= MAX_LOGIT_BIASES, "sampling.logit_bias", problem)
    for token_id, value in islice(bias.items(), MAX_LOGIT_BIASES):
        field = f"sampling.logit_bias[{token_id}]"
        check.that(token_id < info.vocab_size, field, f"is outside the vocabulary of {info.vocab_size} tokens")
        problem = f"is {value}, must lie in [{-MAX_LOGIT_BIAS}, {MAX_LOGIT_BIAS}]"
        check.that(abs(value) <= MAX_LOGIT_BIAS, field, problem)
    return dict(bias)


def stop_of(check: Checker, stop: Sequence[str], limits: LimitsConfig) -> tuple[str, ...]:
    problem = f"has {len(stop)} entries, at most {limits.max_stop_strings} are allowed"
    check.that(len(stop) <= limits.max_stop_strings, "stopping.stop", problem)
    for index, text in enumerate(stop[:MAX_VIOLATIONS]):
        field, longest = f"stopping.stop[{index}]", limits.max_stop_string_chars
        check.that(bool(text), field, "is empty")
        check.that(len(text) <= longest, field, f"has {len(text)} characters, at most {longest} are allowed")
    return tuple(stop)


def policy_of(check: Checker, speculation: pb.SpeculationOptions, verifier: VerifierConfig) -> str:
    if not speculation.HasField("policy"):
        return verifier.default_policy
    spec = speculation.policy
    try:
        parse_policy(spec[:MAX_POLICY_CHARS])
    except ValueError as error:
        check.that(False, "speculation.policy", str(error))
        return spec
    allowed = verifier.allowed_policies
    admitted = any(spec.startswith(entry) if entry.endswith(":") else spec == entry for entry in allowed)
    problem = f"{quoted(spec)} is not allowed here; allowed: {', '.join(allowed)}"
    check.that(admitted and len(spec) <= MAX_POLICY_CHARS, "speculation.policy", problem)
    return spec


def optional(check: Checker, message: Message, path: str, low: N, high: N) -> N | None:
    """The optional field at the end of `path`, None if unset."""
    name = path.rpartition(".")[2]
    if not message.HasField(name):
        return None
    value: N = getattr(message, name)
    check.that(low <= value <= high, path, f"is {value}, must lie in [{low}, {high}]")
    return value


def too_long(length: int, info: ServedModel) -> str:
    return f"has {length} tokens; prompt and output together are at most {info.max_context_tokens}"


def quoted(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:64] + "…")
