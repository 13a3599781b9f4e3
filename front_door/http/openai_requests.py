"""OpenAI's request bodies, and the generation requests they become. The verifier checks the values."""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from front_door.http.tool_calls import Finder, FreeCalls, PlainText
from front_door.http.tools import SPACING, ChatInput, Input, Many
from treeline.errors import FieldViolation, InvalidRequestError
from treeline.request import MAX_ANSWERS, GenerateOptions, generate_request
from treeline.v1 import generation_pb2 as pb

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
MAX_NAMED, MAX_NAME_CHARS = 16, 64
"""Limits of the ignored fields that a response header names: clients limit headers."""
ALIKE = 0.8
"""Least difflib ratio: `max_new_tokens` is like `max_tokens` (0.83), OpenAI's `store` is not like `stop` (0.67)."""


class StreamOptions(BaseModel):
    include_usage: bool = False


class JsonSchema(BaseModel):
    definition: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's field; `json` is a schema, `grammar` is in Lark's notation."""

    definition: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Many[str] | None = None
    grammar: str | None = None


class Body(Input):
    """What chat and text completions have in common. Fields that Treeline does not know are ignored, and named in the
    response header `x-treeline-ignored`."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_ANSWERS)
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    max_tokens: Int64 | None = None
    min_tokens: Int64 | None = None
    stop: str | Many[str] | None = None
    stop_token_ids: Many[TokenId] = Field(default=[])
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    priority: Int32 = 0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    policy: str | None = None
    max_draft_nodes: Int64 | None = None
    max_draft_depth: Int64 | None = None
    explain: bool | Literal["tree"] = False
    target_time_per_output_token_ms: float | None = None

    @property
    def ignored(self) -> list[str]:
        """Names of given fields without effect, each with the field that may be meant, safe for a header."""
        given = [name[:MAX_NAME_CHARS] for name in sorted(self.model_extra or ())[:MAX_NAMED]]
        known = type(self).model_fields
        meant = [difflib.get_close_matches(name, known, 1, ALIKE) for name in given]
        return [
            quote(name, errors="replace") + (f" (did you mean {close[0]}?)" if close else "")
            for name, close in zip(given, meant, strict=True)
        ]

    @property
    def grammar(self) -> pb.Grammar | None:
        """What the answer must match, if anything."""
        wanted, asked = self.response_format, self.structured_outputs
        if asked is not None:
            if len(asked.model_fields_set) != 1:
                problem = "give one of json, regex, choice and grammar"
                raise InvalidRequestError(FieldViolation("structured_outputs", problem))
            schema = asked.definition if isinstance(asked.definition, str | None) else json.dumps(asked.definition)
            choice = None if asked.choice is None else pb.Choice(texts=asked.choice)
            return pb.Grammar(json_schema=schema, regex=asked.regex, choice=choice, lark=asked.grammar)
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return pb.Grammar(json_schema=json.dumps(SPACING | {"type": "object"}))
        if wanted.json_schema is None:
            raise InvalidRequestError(FieldViolation("response_format.json_schema", "is missing"))
        return pb.Grammar(json_schema=json.dumps(SPACING | wanted.json_schema.definition))

    def common(self, request_id: str, index: int, grammar: pb.Grammar | None) -> pb.GenerateRequest:
        """The request for `n` answers to prompt number `index`, without its input."""
        shared = {name: getattr(self, name) for name in GenerateOptions.__optional_keys__ & Body.model_fields.keys()}
        own = {
            "request_id": f"{request_id}-{index}" if index else request_id,
            "grammar": grammar,
            # Each answer draws its own noise.
            "seed": None if self.seed is None else (self.seed + index * self.n) % 2**64,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "include_stop": self.include_stop_str_in_output,
            "explain": bool(self.explain),
            "explain_tree": self.explain == "tree",
            "max_nodes": self.max_draft_nodes,
            "max_depth": self.max_draft_depth,
        }
        return generate_request(**(shared | own))


class ChatBody(Body, ChatInput):
    """POST /v1/chat/completions."""

    max_completion_tokens: Int64 | None = None
    logprobs: bool = False
    top_logprobs: Int64 | None = None

    def requests(self, request_id: str, tool_call_format: str) -> list[pb.GenerateRequest]:
        """The generation request.

        Raises:
            InvalidRequestError: tools are combined with an answer format, or a chosen tool does not exist.
        """
        chat, grammar, binding = self.chat(tool_call_format), self.grammar, self.binding(tool_call_format)
        finder = self.finder(tool_call_format)
        if grammar is not None and not isinstance(finder, PlainText):
            field = "response_format" if self.structured_outputs is None else "structured_outputs"
            raise InvalidRequestError(FieldViolation(field, "needs tool_choice none where there are tools"))
        request = self.common(request_id, 0, grammar or binding)
        request.chat.CopyFrom(chat)
        if self.max_completion_tokens is not None:
            request.stopping.max_tokens = self.max_completion_tokens
        if self.logprobs:
            request.output.logprobs = self.top_logprobs or 0
        if isinstance(finder, FreeCalls):
            request.output.skip_special_tokens = False  # a call's marks may be special
        return [request]

    def finders(self, tool_call_format: str) -> list[Finder]:
        return [self.finder(tool_call_format) for _ in range(self.n)]


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | Many[str] | Many[TokenId] | Many[Many[TokenId]]
    logprobs: Int64 | None = None
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    def requests(self, request_id: str, tool_call_format: str = "") -> list[pb.GenerateRequest]:
        """A generation request for each prompt.

        Raises:
            InvalidRequestError: there are too many of them, or none; or a scored prompt has several answers.
        """
        prompts: list[Any] = list(self.prompts)
        if not 1 <= len(prompts) * self.n <= MAX_ANSWERS:
            problem = f"{len(prompts)} prompts times n = {self.n}: 1 to {MAX_ANSWERS} answers are possible"
            raise InvalidRequestError(FieldViolation("prompt", problem))
        if self.echo and self.logprobs is not None and self.n > 1:
            raise InvalidRequestError(FieldViolation("n", "must be 1 with both echo and logprobs"))
        requests: list[pb.GenerateRequest] = []
        for prompt in prompts:
            request = self.common(request_id, len(requests), self.grammar)
            if isinstance(prompt, str):
                request.prompt = prompt
            else:
                request.token_ids.ids.extend(prompt)
            if self.logprobs is not None:
                request.output.logprobs = self.logprobs
                if self.echo:
                    request.output.prompt_logprobs = self.logprobs
            requests.append(request)
        return requests

    def finders(self, tool_call_format: str) -> list[Finder]:
        return [PlainText() for _ in range(len(self.prompts) * self.n)]


class TokenizeBody(ChatInput):
    """POST /tokenize: a prompt, or a chat."""

    prompt: str | None = None

    def request(self, tool_call_format: str) -> pb.TokenizeRequest:
        if self.messages:
            return pb.TokenizeRequest(chat=self.chat(tool_call_format))
        return pb.TokenizeRequest(prompt=self.prompt or "")


class DetokenizeBody(Input):
    """POST /detokenize."""

    tokens: Many[TokenId]
