"""Checks a request and reports every violation at once. The only place where requests are checked."""

from __future__ import annotations

from dataclasses import replace

from treeline.config import LimitsConfig, VerifierConfig
from treeline.errors import FieldViolation, InvalidRequestError, UnknownModelError
from treeline.request import MAX_ANSWERS, MAX_PRIORITY
from treeline.v1 import generation_pb2 as pb
from verifier_svc.engine.request import GenerationRequest
from verifier_svc.service.chat import Prompt
from verifier_svc.service.fields import (
    Checker,
    ServedModel,
    delivered_of,
    known_token_ids,
    optional,
    policy_of,
    prompt_of,
    quoted,
    sampling_of,
    stop_of,
    too_long,
)

DEFAULT_MAX_TOKENS = 256
"""For a request that names no limit, unless its `min_tokens` is higher."""
UNSET = -1
"""The `max_tokens` of such a request until its prompt is known."""
MAX_STOP_TOKEN_IDS = 256
MAX_ELAPSED_S = 7 * 86400
"""A stream that broke a week ago is not resumed."""
LOGPROB_BYTES = 40
"""Of one log-probability in a message: id, value and framing take 16, the token's text seldom more than the rest."""


def parse_generate(
    request: pb.GenerateRequest, info: ServedModel, limits: LimitsConfig, verifier: VerifierConfig
) -> tuple[GenerationRequest, Prompt]:
    """The checked request and its prompt, which is still to be tokenised and then added by `with_prompt`.

    Raises:
        UnknownModelError: the request names another model than the served one.
        InvalidRequestError: one violation for each wrong field.
    """
    if request.model and request.model != info.name:
        raise UnknownModelError(f"model {quoted(request.model)} is not served here; {info.name!r} is")
    check = Checker()
    prompt = prompt_of(check, request, info)
    fewest = 0 if request.output.HasField("prompt_logprobs") else 1
    max_tokens = optional(check, request.stopping, "stopping.max_tokens", fewest, limits.max_output_tokens)
    checked = GenerationRequest(
        request_id=request.request_id,
        prompt_token_ids=[],
        sampling=sampling_of(check, request.sampling, info),
        max_tokens=UNSET if max_tokens is None else max_tokens,
        stop=stop_of(check, request.stopping.stop, limits),
        stop_token_ids=frozenset(
            known_token_ids(check, "stopping.stop_token_ids", request.stopping.stop_token_ids, info)
        ),
        ignore_eos=request.stopping.ignore_eos,
        min_tokens=optional(check, request.stopping, "stopping.min_tokens", 0, limits.max_output_tokens) or 0,
        include_stop=request.stopping.include_stop,
        skip_special_tokens=request.output.skip_special_tokens or not request.output.HasField("skip_special_tokens"),
        logprobs=optional(check, request.output, "output.logprobs", 0, limits.max_logprobs),
        prompt_logprobs=optional(check, request.output, "output.prompt_logprobs", 0, limits.max_logprobs),
        explain=request.output.explain or request.output.explain_tree,
        explain_tree=request.output.explain_tree,
        policy=policy_of(check, request.speculation, verifier),
        max_nodes=optional(check, request.speculation, "speculation.max_nodes", 0, limits.max_tree_nodes),
        max_depth=optional(check, request.speculation, "speculation.max_depth", 0, limits.max_tree_depth),
        priority=request.priority,
        target_ms=optional(check, request, "target_time_per_output_token_ms", 0.1, 60000.0),
        delivered_token_ids=delivered_of(check, request, info),
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
    n = optional(check, request, "n", 1, MAX_ANSWERS) or 1
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
        raise InvalidRequestError(FieldViolation(field, too_long(length, info)))
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
    """One engine request, with its index, per answer that is `asked` for and not complete yet.

    Answer i is drawn with seed + i, as if it had been requested alone.
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
    check = Checker()
    prompt = prompt_of(check, request, info)
    check.done()
    return prompt


def parse_detokenize(request: pb.DetokenizeRequest, info: ServedModel) -> list[int]:
    """The token ids. Raises InvalidRequestError."""
    check = Checker()
    ids, most = request.token_ids, info.max_context_tokens
    if check.that(len(ids) <= most, "token_ids", f"has {len(ids)} tokens, more than the {most} of the context"):
        known_token_ids(check, "token_ids", ids, info)
    check.done()
    return list(ids)
