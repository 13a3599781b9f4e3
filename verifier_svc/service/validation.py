"""Checks a request field by field and reports every violation at once. The only place where requests are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

from google.protobuf.message import Message

from planner.policies import parse_policy
from treeline.config import LimitsConfig, VerifierConfig
from treeline.errors import FieldViolation, InvalidRequestError, UnknownModelError
from treeline.request import MAX_ANSWERS, MAX_PRIORITY
from treeline.sampling import SamplingParams
from treeline.v1 import generation_pb2 as pb
from verifier_svc.engine.request import GenerationRequest
from verifier_svc.service.chat import ROLES, Chat, Prompt

DEFAULT_MAX_TOKENS = 256
UNSET = -1
"""The `max_tokens` of a request that names none, until its prompt is known."""
MAX_POLICY_CHARS = 64
MAX_STOP_TOKEN_IDS = 256
CHARACTERS_PER_TOKEN = 32
"""On average of a whole prompt at most. Prose has 4 to 5; only runs of one character, such as spaces, come near."""
MAX_ELAPSED_S = 7 * 86400
GREEDY_BELOW, MAX_TEMPERATURE = 0.01, 100.0
"""A colder temperature than the first differs from greedy only where two logits all but tie."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_PENALTY, MAX_LOGIT_BIAS, MAX_LOGIT_BIASES = 2.0, 100.0, 300
"""As in OpenAI's API."""
LOGPROB_BYTES = 40
"""Of one log-probability in a message: id, value and framing take 16, the token's text seldom more than the rest."""
MAX_VIOLATIONS = 16

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class ServedModel:
    """The target as clients see it.

    Attributes:
        max_context_tokens: of prompt and output together.
        tool_call_format: see `chat.tool_call_format`.
        sampling: what fields of SamplingParams take that a request leaves unset.
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


def parse_generate(
    request: pb.GenerateRequest, info: ServedModel, limits: LimitsConfig, verifier: VerifierConfig
) -> tuple[GenerationRequest, Prompt]:
    """The checked request and its prompt, which is still to be tokenised and then added by `with_prompt`.

    Raises:
        UnknownModelError: the request names another model than the served one.
        InvalidRequestError: one violation for each wrong field.
    """
    if request.model and request.model != info.name:
        raise UnknownModelError(f"model {_quoted(request.model)} is not served here; {info.name!r} is")
    check = _Checker()
    prompt = _prompt(check, request, info)
    fewest = 0 if request.output.HasField("prompt_logprobs") else 1
    max_tokens = _optional(check, request.stopping, "stopping.max_tokens", fewest, limits.max_output_tokens)
    checked = GenerationRequest(
        request_id=request.request_id,
        prompt_token_ids=[],
        sampling=_sampling(check, request.sampling, info),
        max_tokens=UNSET if max_tokens is None else max_tokens,
        stop=_stop(check, request.stopping.stop, limits),
        stop_token_ids=frozenset(_token_ids(check, "stopping.stop_token_ids", request.stopping.stop_token_ids, info)),
        ignore_eos=request.stopping.ignore_eos,
        min_tokens=_optional(check, request.stopping, "stopping.min_tokens", 0, limits.max_output_tokens) or 0,
        include_stop=request.stopping.include_stop,
        skip_special_tokens=request.output.skip_special_tokens or not request.output.HasField("skip_special_tokens"),
        logprobs=_optional(check, request.output, "output.logprobs", 0, limits.max_logprobs),
        prompt_logprobs=_optional(check, request.output, "output.prompt_logprobs", 0, limits.max_logprobs),
        explain=request.output.explain or request.output.explain_tree,
        explain_tree=request.output.explain_tree,
        policy=_policy(check, request.speculation, verifier),
        max_nodes=_optional(check, request.speculation, "speculation.max_nodes", 0, limits.max_tree_nodes),
        max_depth=_optional(check, request.speculation, "speculation.max_depth", 0, limits.max_tree_depth),
        priority=request.priority,
        target_ms=_optional(check, request, "target_time_per_output_token_ms", 0.1, 60000.0),
        delivered_token_ids=_delivered(check, request, info),
        elapsed_s=request.resume.elapsed_s,
        time_to_first_token_s=request.resume.time_to_first_token_s,
    )
    check.that(
        0 <= checked.time_to_first_token_s <= checked.elapsed_s <= MAX_ELAPSED_S,
        "resume.elapsed_s",
        f"and time_to_first_token_s must be 0 <= time_to_first_token_s <= elapsed_s <= {MAX_ELAPSED_S}",
    )
    check.that(
        not checked.delivered_token_ids or request.sampling.HasField("seed"),
        "sampling.seed",
        "is needed to resume: the one that the broken stream named",
    )
    n = _optional(check, request, "n", 1, MAX_ANSWERS) or 1
    check.that(len(request.resume.answers) <= n, "resume.answers", f"are more than {n}")
    check.that(
        len(request.stopping.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
        "stopping.stop_token_ids",
        f"has {len(request.stopping.stop_token_ids)} entries, at most {MAX_STOP_TOKEN_IDS} are allowed",
    )
    check.that(
        checked.max_tokens < 0 or checked.min_tokens <= checked.max_tokens,
        "stopping.min_tokens",
        f"is {checked.min_tokens}, more than max_tokens, which is {checked.max_tokens}",
    )
    check.that(
        abs(request.priority) <= MAX_PRIORITY,
        "priority",
        f"is {request.priority}, must lie in [-{MAX_PRIORITY}, {MAX_PRIORITY}]",
    )
    check.done()
    return checked, prompt


def with_prompt(
    request: GenerationRequest, prompt: Prompt, prompt_token_ids: list[int], info: ServedModel, limits: LimitsConfig
) -> GenerationRequest:
    """`request` with its tokenised prompt, and with the default of `max_tokens` if none was asked for.

    Raises:
        InvalidRequestError: the prompt, or prompt and `max_tokens` together, exceed the context.
    """
    field = "prompt" if isinstance(prompt, str) else "chat.messages"
    length, room = len(prompt_token_ids), info.max_context_tokens - len(prompt_token_ids)
    if not prompt_token_ids:
        raise InvalidRequestError(FieldViolation(field, "holds no token"))
    if room < 1:
        raise InvalidRequestError(FieldViolation(field, _too_long(length, info)))
    if request.max_tokens > room:
        problem = f"{length} prompt tokens leave room for {room} of {info.max_context_tokens}, not {request.max_tokens}"
        raise InvalidRequestError(FieldViolation("stopping.max_tokens", problem))
    entries = 0 if request.prompt_logprobs is None else length * (1 + request.prompt_logprobs)
    if entries * LOGPROB_BYTES > limits.max_message_bytes:
        problem = f"{entries} entries of about {LOGPROB_BYTES} bytes do not fit limits.max_message_bytes"
        raise InvalidRequestError(FieldViolation("output.prompt_logprobs", problem))
    max_tokens = request.max_tokens
    if max_tokens == UNSET:
        max_tokens = min(max(DEFAULT_MAX_TOKENS, request.min_tokens), limits.max_output_tokens, room)
    delivered = len(request.delivered_token_ids)
    if delivered > max_tokens:
        problem = f"has {delivered} tokens, more than the {max_tokens} of the whole answer"
        raise InvalidRequestError(FieldViolation("resume.token_ids", problem))
    return replace(request, prompt_token_ids=prompt_token_ids, max_tokens=max_tokens)


def answer_id(request_id: str, index: int) -> str:
    """The id of one answer in the engine."""
    return f"{request_id}#{index}" if index else request_id


def split(request: GenerationRequest, asked: pb.GenerateRequest) -> list[tuple[int, GenerationRequest]]:
    """What each of the answers that are `asked` for needs of the engine, with its index. Complete ones need nothing.

    Answer i is drawn with seed + i, as if it had been asked for alone.
    """
    n = asked.n or 1
    if n == 1:
        return [(0, request)]
    resumed = [*asked.resume.answers, *(pb.ResumedAnswer() for _ in range(n))]
    return [
        (
            index,
            replace(
                request,
                request_id=answer_id(request.request_id, index),
                prompt_logprobs=None if index else request.prompt_logprobs,
                sampling=replace(request.sampling, seed=(request.sampling.seed + index) % 2**64),
                delivered_token_ids=tuple(resumed[index].token_ids),
            ),
        )
        for index in range(n)
        if not resumed[index].complete
    ]


def parse_tokenize(request: pb.TokenizeRequest, info: ServedModel) -> Prompt:
    """What to tokenise.

    Raises:
        InvalidRequestError: as for Generate.
    """
    check = _Checker()
    prompt = _prompt(check, request, info)
    check.done()
    return prompt


def parse_detokenize(request: pb.DetokenizeRequest, info: ServedModel) -> list[int]:
    """The token ids. Raises InvalidRequestError."""
    check = _Checker()
    ids, most = request.token_ids, info.max_context_tokens
    if check.that(len(ids) <= most, "token_ids", f"has {len(ids)} tokens, more than the {most} of the context"):
        _token_ids(check, "token_ids", ids, info)
    check.done()
    return list(ids)


class _Checker:
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


def _prompt(check: _Checker, request: pb.GenerateRequest | pb.TokenizeRequest, info: ServedModel) -> Prompt:
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
        if check.that(len(ids) < info.max_context_tokens, "token_ids.ids", _too_long(len(ids), info)):
            return _token_ids(check, "token_ids.ids", ids, info)
        return []
    check.that(False, "input", "give one of " + ", ".join(f.name for f in request.DESCRIPTOR.oneofs[0].fields))
    return ""


def _chat(check: _Checker, chat: pb.Chat, info: ServedModel) -> Chat:
    messages = chat.messages
    check.that(info.has_chat_template, "chat", f"model {info.name!r} has no chat template; send a prompt")
    check.that(len(messages) > 0, "chat.messages", "is empty")
    characters = sum(len(message.content) + len(message.fields) for message in messages)
    _check_characters(check, "chat.messages", characters + len(chat.template_arguments), info)
    for index, message in enumerate(messages[:MAX_VIOLATIONS]):
        field = f"chat.messages[{index}]"
        problem = f"is {_quoted(message.role)}, must be one of {', '.join(ROLES)}"
        check.that(message.role in ROLES, f"{field}.role", problem)
        check.that(message.role != "user" or bool(message.content), f"{field}.content", "is empty")
    more = [_object(check, f"chat.messages[{index}].fields", m.fields) for index, m in enumerate(messages)]
    return Chat(
        [{**fields, "role": m.role, "content": m.content} for m, fields in zip(messages, more, strict=True)],
        _object(check, "chat.template_arguments", chat.template_arguments),
        chat.continue_final_message if chat.HasField("continue_final_message") else None,
        chat.add_generation_prompt if chat.HasField("add_generation_prompt") else None,
    )


def _object(check: _Checker, field: str, text: str) -> dict[str, Any]:
    """The JSON object in `text`; empty for no text. Half a surrogate pair, which JSON can spell, is no text."""
    try:
        value = json.loads(text or "{}")
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = None
    return value if check.that(isinstance(value, dict), field, "is no JSON object") else {}


def _check_characters(check: _Checker, field: str, characters: int, info: ServedModel) -> None:
    """Refuse what cannot fit the context before a tokeniser works on it for seconds."""
    most = info.max_context_tokens * CHARACTERS_PER_TOKEN
    problem = f"has {characters} characters; {info.max_context_tokens} tokens are taken to hold {most} at most"
    check.that(characters <= most, field, problem)


def _token_ids(check: _Checker, field: str, ids: Sequence[int], info: ServedModel) -> list[int]:
    wrong = next((index for index, token_id in enumerate(ids) if token_id >= info.vocab_size), None)
    if wrong is not None:
        problem = f"is {ids[wrong]}, outside the vocabulary of {info.vocab_size} tokens"
        check.that(False, f"{field}[{wrong}]", problem)
    return list(ids)


def _delivered(check: _Checker, request: pb.GenerateRequest, info: ServedModel) -> tuple[int, ...]:
    """The tokens that were delivered before; of several answers, those of the longest one."""
    answers = [request.resume.token_ids, *(answer.token_ids for answer in request.resume.answers)]
    field = "resume.answers" if request.resume.answers else "resume"
    return max((tuple(_token_ids(check, f"{field}.token_ids", ids, info)) for ids in answers), key=len)


def _sampling(check: _Checker, given: pb.SamplingParams, info: ServedModel) -> SamplingParams:
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


def _logit_bias(check: _Checker, bias: Mapping[int, float], info: ServedModel) -> dict[int, float]:
    problem = f"has {len(bias)} entries, at most {MAX_LOGIT_BIASES} are allowed"
    check.that(len(bias) <= MAX_LOGIT_BIASES, "sampling.logit_bias", problem)
    for token_id, value in islice(bias.items(), MAX_LOGIT_BIASES):
        field = f"sampling.logit_bias[{token_id}]"
        check.that(token_id < info.vocab_size, field, f"is outside the vocabulary of {info.vocab_size} tokens")
        problem = f"is {value}, must lie in [{-MAX_LOGIT_BIAS}, {MAX_LOGIT_BIAS}]"
        check.that(abs(value) <= MAX_LOGIT_BIAS, field, problem)
    return dict(bias)


def _stop(check: _Checker, stop: Sequence[str], limits: LimitsConfig) -> tuple[str, ...]:
    problem = f"has {len(stop)} entries, at most {limits.max_stop_strings} are allowed"
    check.that(len(stop) <= limits.max_stop_strings, "stopping.stop", problem)
    for index, text in enumerate(stop[:MAX_VIOLATIONS]):
        field, longest = f"stopping.stop[{index}]", limits.max_stop_string_chars
        check.that(bool(text), field, "is empty")
        check.that(len(text) <= longest, field, f"has {len(text)} characters, at most {longest} are allowed")
    return tuple(stop)


def _policy(check: _Checker, speculation: pb.SpeculationOptions, verifier: VerifierConfig) -> str:
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
    problem = f"{_quoted(spec)} is not allowed here; allowed: {', '.join(allowed)}"
    check.that(admitted and len(spec) <= MAX_POLICY_CHARS, "speculation.policy", problem)
    return spec


def _optional(check: _Checker, message: Message, path: str, low: N, high: N) -> N | None:
    """The optional field at the end of `path`, None if unset."""
    name = path.rpartition(".")[2]
    if not message.HasField(name):
        return None
    value: N = getattr(message, name)
    check.that(low <= value <= high, path, f"is {value}, must lie in [{low}, {high}]")
    return value


def _too_long(length: int, info: ServedModel) -> str:
    return f"has {length} tokens; prompt and output together are at most {info.max_context_tokens}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:64] + "…")
