"""The tools of a chat: how a model is told of them and bound to them, and how its calls are found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Json, model_validator

from front_door.http.tool_calls import SPELLINGS, BoundCalls, Finder, FreeCalls, PlainText
from treeline.errors import FieldViolation, InvalidRequestError
from treeline.v1 import generation_pb2 as pb

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SPACING = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""An llguidance option. Models that may write white space between values can get lost in it."""
INSTRUCTION = """\
You can call these functions:
{functions}
To call one, answer with its name and arguments as JSON and nothing else, one call a line:
{{"name": "...", "arguments": {{...}}}}"""


T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at its first invalid element: a body has room for a million of them."""


class Input(BaseModel):
    """A body. Its texts are Unicode: half a surrogate pair, which JSON can spell, is refused."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, fields: Any) -> Any:
        for name, value in fields.items() if isinstance(fields, dict) else ():
            try:
                json.dumps({name: value}, ensure_ascii=False).encode()
            except (UnicodeEncodeError, RecursionError):
                problem = "is nested too deeply, or holds half a surrogate pair"
                field = name.encode(errors="replace").decode()
                raise InvalidRequestError(FieldViolation(field, problem)) from None
        return fields


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"]
    function: FunctionName


class Called(BaseModel):
    name: str
    arguments: Json[dict[str, Any]] | dict[str, Any]


class ToolCall(BaseModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: Called


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat. Its other fields go to the chat template unchanged."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Many[TextPart] | None = None
    tool_calls: Many[ToolCall] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])

    def proto(self) -> pb.ChatMessage:
        fields = self.model_dump(exclude={"role", "content"}, exclude_none=True)
        return pb.ChatMessage(role=self.role, content=self.text, fields=json.dumps(fields) if fields else "")


class ChatInput(Input):
    """A chat, and what its template gets in addition."""

    messages: Many[Message] = Field(default=[], min_length=1)
    tools: Many[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def chat(self, tool_call_format: str) -> pb.Chat:
        """The chat for a model with this format of tool calls. For an unknown one, tools become part of the text."""
        known, arguments = tool_call_format in SPELLINGS, dict(self.chat_template_kwargs)
        if known and self._offered:
            arguments["tools"] = [tool.model_dump(exclude_unset=True) for tool in self._offered]
        chat = pb.Chat(
            messages=[message.proto() for message in self.messages] if known else self._told(),
            template_arguments=json.dumps(arguments) if arguments else "",
        )
        for name in ("add_generation_prompt", "continue_final_message"):
            if (wanted := getattr(self, name)) is not None:
                setattr(chat, name, wanted)
        return chat

    def binding(self, tool_call_format: str) -> pb.Grammar | None:
        """What the answer must match: a call of a declared function, or else, where the model may choose, any text."""
        if not self._is_bound(tool_call_format):
            return None
        several = self.parallel_tool_calls and not isinstance(self.tool_choice, NamedTool)
        functions = [tool.function for tool in self._callable]
        rules = [
            "start: calls" if self.tool_choice != "auto" else "start: calls | TEXT?",
            'calls: call ("\\n" call)*' if several else "calls: call",
            "call: " + " | ".join(f"call_{index}" for index in range(len(functions))),
            "TEXT: /[^{](?s:.)*/" if self.tool_choice == "auto" else "",
        ]
        for index, function in enumerate(functions):
            head = json.dumps(f'{{"name": "{function.name}", "arguments": ')
            schema = SPACING | (NO_PARAMETERS if function.parameters is None else function.parameters)
            rules.append(f'call_{index}: {head} arguments_{index} "}}"')
            rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
        return pb.Grammar(lark="\n".join(rules))

    def finder(self, tool_call_format: str) -> Finder:
        """Finds the calls of one answer."""
        if not self._offered:
            return PlainText()
        if self._is_bound(tool_call_format):
            return BoundCalls()
        names = {tool.function.name for tool in self.tools}
        return FreeCalls(SPELLINGS[tool_call_format], names, self.parallel_tool_calls)

    def _is_bound(self, tool_call_format: str) -> bool:
        """Whether a grammar binds the answer to the tools."""
        return self.tool_choice not in ("none", "auto") or bool(self._offered and tool_call_format not in SPELLINGS)

    @property
    def _offered(self) -> Sequence[Tool]:
        return () if self.tool_choice == "none" else self.tools

    @property
    def _callable(self) -> Sequence[Tool]:
        """Tools that the answer may call.

        Raises:
            InvalidRequestError: there is none, or the arguments of one are not an object.
        """
        tools, choice = self.tools, self.tool_choice
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise InvalidRequestError(FieldViolation("tool_choice", "names no function of `tools`"))
        for index, tool in enumerate(self.tools):
            if (tool.function.parameters or NO_PARAMETERS).get("type") != "object":
                problem = 'must be of "type": "object"'
                raise InvalidRequestError(FieldViolation(f"tools[{index}].function.parameters", problem))
        return tools

    def _told(self) -> list[pb.ChatMessage]:
        """The messages in roles that every template knows: calls are the assistant's text, results the user's."""
        told = [_plain(message) for message in self.messages]
        if self._offered:
            functions = [json.dumps(tool.function.model_dump(exclude_none=True)) for tool in self._offered]
            if told[0].role != "system":
                told.insert(0, pb.ChatMessage(role="system"))
            parts = [told[0].content, INSTRUCTION.format(functions="\n".join(functions))]
            told[0].content = "\n\n".join(part for part in parts if part)
        return told


def _plain(message: Message) -> pb.ChatMessage:
    calls = [json.dumps(call.function.model_dump()) for call in message.tool_calls or ()]
    if message.role == "tool":
        return pb.ChatMessage(role="user", content=f"Result: {message.text}")
    if not calls:
        return message.proto()
    return pb.ChatMessage(role=message.role, content="\n".join([*([message.text] if message.text else []), *calls]))
