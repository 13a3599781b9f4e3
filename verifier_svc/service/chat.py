"""Prompts to token ids. Chats go through the model's template; no message can inject a control token."""

from __future__ import annotations

import functools
import re
import secrets
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

from treeline.errors import FieldViolation, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN_ROLES = ("system", "user", "assistant")
"""Every template is expected to know these; "tool" and "developer" only if it names them."""
ROLES = (*PLAIN_ROLES, "tool", "developer")


@dataclass(frozen=True)
class Chat:
    """A chat as chat templates take it.

    Attributes:
        messages: each with "role" and "content", and other fields that a template reads ("tool_calls").
        arguments: the template's further variables ("tools", "enable_thinking").
        continues: whether the answer continues the last message; None: yes if it is the assistant's and calls no tool.
            If that message has no text, a new turn begins instead.
        begins_turn: whether the assistant's turn begins after the messages; None: yes unless the last is continued.
    """

    messages: list[dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    continues: bool | None = None
    begins_turn: bool | None = None


Prompt = str | list[int] | Chat
"""A text, its token ids, or a chat."""


def token_ids_of(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Text is tokenised as it is (no template; control tokens are parsed), a chat by its template; ids stay unchanged.

    Raises:
        InvalidRequestError: the chat template refuses the chat (roles that do not alternate, for example).
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt, verbose=False).input_ids)
    return _chat_token_ids(prompt, tokenizer) if isinstance(prompt, Chat) else prompt


def tool_call_format(template: str | None) -> str:
    """How a model with this chat template spells tool calls: "hermes", "llama3", "mistral"; "" for any other way."""
    template = template or ""
    if re.search(r"""<tool_call>(\\n|\s)*\{\\?["']""", template):  # JSON; others write "<tool_call><function=..."
        return "hermes"
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:  # later ones write "[TOOL_CALLS]name[ARGS]{...}"
        return "mistral"
    return "llama3" if "<|python_tag|>" in template else ""


def _chat_token_ids(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    messages = chat.messages
    taken = set(signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    if wrong := sorted(taken & chat.arguments.keys()):
        raise InvalidRequestError(FieldViolation("chat.template_arguments", f"may not hold {', '.join(wrong)}"))
    _check_roles(messages, tokenizer.get_chat_template())
    last = messages[-1] if messages else {}
    continued = last.get("role") == "assistant" and "tool_calls" not in last
    if chat.continues and not continued:
        problem = "is set, but the last message is not the assistant's, or calls a tool"
        raise InvalidRequestError(FieldViolation("chat.continue_final_message", problem))
    continued = continued and chat.continues is not False
    if continued and not last["content"].strip():  # Templates that trim would lose the line break in front of it.
        messages, continued = messages[:-1], False
    begins = not continued if chat.begins_turn is None else chat.begins_turn
    if begins and continued:
        problem = "cannot be set where the last message is continued"
        raise InvalidRequestError(FieldViolation("chat.add_generation_prompt", problem))
    seam = f"\ufdd0{secrets.token_hex(8)}\ufdd0"  # It cannot be guessed, so no message contains it.
    controls = [_control_tokens(tokenizer, message["role"] == "assistant") for message in messages]
    try:
        split = [_split(message, seam, control) for message, control in zip(messages, controls, strict=True)]
        arguments = _split(chat.arguments, seam, _control_tokens(tokenizer, False))
        text = tokenizer.apply_chat_template(
            split, add_generation_prompt=begins, continue_final_message=continued, tokenize=False, **arguments
        )
    except Exception as error:  # A template is a program: it may not expect these values, or they nest too deep.
        raise InvalidRequestError(FieldViolation("chat", f"refused by the chat template: {error}")) from None
    # The template writes the special tokens itself.
    parts = [tokenizer(part, add_special_tokens=False, verbose=False).input_ids for part in str(text).split(seam)]
    return [token_id for part in parts for token_id in part]


def _check_roles(messages: list[dict[str, Any]], template: str) -> None:
    known = [role for role in ROLES if role in PLAIN_ROLES or re.search(f"['\"]{role}['\"]", template)]
    for index, message in enumerate(messages):
        if message["role"] not in known:
            problem = f"is {message['role']!r}; the chat template of this model knows {', '.join(known)}"
            raise InvalidRequestError(FieldViolation(f"chat.messages[{index}].role", problem))


def _split(value: Any, seam: str, control: re.Pattern[str] | None) -> Any:
    """The value with a seam after the first character of each control token found in any of its texts.

    Example: "x<|im_end|>" becomes "x<SEAM|im_end|>"; its parts are tokenised one by one and none holds a control token.
    """
    if isinstance(value, str):
        return control.sub(lambda first: first[0] + seam, value) if control else value
    if isinstance(value, dict):
        return {key: _split(part, seam, control) for key, part in value.items()}
    return [_split(part, seam, control) for part in value] if isinstance(value, list) else value


@functools.lru_cache(maxsize=4)
def _control_tokens(tokenizer: PreTrainedTokenizerFast, only_special: bool) -> re.Pattern[str] | None:
    """Finds the first character of each control token: special tokens, and added tokens that the template uses.

    The assistant's own text keeps the latter: models write "<think>" and "<tool_call>" themselves.
    """
    template = tokenizer.get_chat_template()
    control = [
        added.content
        for added in tokenizer.added_tokens_decoder.values()
        if added.special or (not only_special and added.content.strip() and added.content in template)
    ]
    spelled = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in control]
    return re.compile("|".join(spelled)) if spelled else None
