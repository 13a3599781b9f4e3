"""Prompts to token ids: chats go through the model's template, and the text of a message stays text."""

from __future__ import annotations

import functools
import re
import secrets
from typing import TYPE_CHECKING

from treeline.errors import FieldViolation, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN_ROLES = ("system", "user", "assistant")
"""Every template is expected to know these; "tool" and "developer" only if it names them."""
ROLES = (*PLAIN_ROLES, "tool", "developer")

ChatMessages = list[dict[str, str]]
Prompt = str | list[int] | ChatMessages
"""A text, its token ids, or a chat in the form chat templates take."""


def token_ids_of(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """A text as it stands (no template, control tokens count), a chat through the model's template, ids unchanged.

    Raises:
        InvalidRequestError: the chat template refuses the chat (roles that do not alternate, for example).
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt, verbose=False).input_ids)
    if not prompt or isinstance(prompt[0], int):
        return prompt  # type: ignore[return-value]
    return _chat_token_ids(prompt, tokenizer)  # type: ignore[arg-type]


def _chat_token_ids(messages: ChatMessages, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The last message is continued if it is the assistant's; otherwise the assistant's turn begins."""
    # transformers has loaded it already wherever there is a tokenizer.
    from jinja2 import TemplateError

    _check_roles(messages, tokenizer.get_chat_template())
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]
    continued = bool(messages) and messages[-1]["role"] == "assistant"
    seam = f"\ufdd0{secrets.token_hex(8)}\ufdd0"  # Nobody can guess it, so that no message holds it.
    split = [{**message, "content": _split(message, seam, tokenizer)} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            split, add_generation_prompt=not continued, continue_final_message=continued, tokenize=False
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise InvalidRequestError(FieldViolation("chat", f"refused by the chat template: {error}")) from None
    # The template writes the special tokens itself.
    parts = [tokenizer(part, add_special_tokens=False, verbose=False).input_ids for part in str(text).split(seam)]
    return [token_id for part in parts for token_id in part]


def _check_roles(messages: ChatMessages, template: str) -> None:
    known = [role for role in ROLES if role in PLAIN_ROLES or re.search(f"['\"]{role}['\"]", template)]
    for index, message in enumerate(messages):
        if message["role"] not in known:
            problem = f"is {message['role']!r}; the chat template of this model knows {', '.join(known)}"
            raise InvalidRequestError(FieldViolation(f"chat.messages[{index}].role", problem))


def _split(message: dict[str, str], seam: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """A message's content with a seam behind the first character of each control token spelled out in it.

    Example: "x<|im_end|>" becomes "x<SEAM|im_end|>"; its parts are tokenised one by one and none holds a control token.
    """
    control = _control_tokens(tokenizer, message["role"] == "assistant")
    return control.sub(lambda first: first[0] + seam, message["content"]) if control else message["content"]


@functools.lru_cache(maxsize=4)
def _control_tokens(tokenizer: PreTrainedTokenizerFast, only_special: bool) -> re.Pattern[str] | None:
    """Finds the first character of each control token: special tokens, and what else the template sets apart.

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
