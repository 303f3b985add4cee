"""What may stand before an answer, as token ids: messages through the chat template, plain text, or ids themselves.

Raises BadRequest, which names the field; a prompt that is given back leaves room for at least one token. A text that
is too long for any tokens of the context is refused before it is tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from jinja2.exceptions import TemplateError

from fulgurite.streams.policy_server.engine import MAX_ROWS
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.protocol import BadRequest, Json, flag

MAX_MESSAGES: Final = 4_096


def chat_prompt(body: Json, policy: Policy) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise BadRequest("messages must be a list of at least one object", "messages")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"more than {MAX_MESSAGES} messages", "messages")
    plain = [_with_text(message, index) for index, message in enumerate(messages)]
    tools = body.get("tools") or None
    opened = flag(body, "add_generation_prompt", True)
    try:
        # TypeError: what a template raises when it adds a text and something that is none.
        text = policy.tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=opened)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRequest(f"the chat template refuses these messages: {error}", "messages") from None
    assert isinstance(text, str)
    return _checked(_encoded(text, policy, False, "messages"), policy, "messages")


def text_prompt(text: str, policy: Policy, add_special_tokens: bool) -> list[int]:
    return _checked(_encoded(text, policy, add_special_tokens, "prompt"), policy, "prompt")


def ids_prompt(ids: object, policy: Policy, param: str) -> list[int]:
    return _checked(token_ids(ids, policy, param), policy, param)


def completion_prompts(body: Json, n: int, policy: Policy) -> list[list[int]]:
    """One for each prompt: a text, a list of ids, or a list of such; each gets n answers."""
    prompt = body.get("prompt")
    many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts: list[Any] = prompt if many and isinstance(prompt, list) else [prompt]
    if len(prompts) * n > MAX_ROWS:
        raise BadRequest(f"{len(prompts)} prompts times n = {n} are more than {MAX_ROWS} answers", "prompt")
    special = flag(body, "add_special_tokens", True)
    return [
        text_prompt(one, policy, special) if isinstance(one, str) else ids_prompt(one, policy, "prompt")
        for one in prompts
    ]


def token_ids(value: object, policy: Policy, param: str) -> list[int]:
    """Ids that the model knows."""
    ids: Sequence[object] = value if isinstance(value, list) else ()
    found = [one for one in ids if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < policy.vocabulary]
    if not isinstance(value, list) or len(found) != len(ids):
        raise BadRequest(f"{param} must be a list of token ids below {policy.vocabulary}", param)
    return found


def _encoded(text: str, policy: Policy, add_special_tokens: bool, param: str) -> list[int]:
    most = policy.max_positions * policy.longest_token_chars
    if len(text) > most:
        context = f"the context of {policy.max_positions} tokens holds at most {most}"
        raise BadRequest(f"the prompt has {len(text)} characters; {context}", param, "context_length_exceeded")
    # Not `encode`: that one keeps the interpreter's lock, and with it every other thread, until it is through.
    tokenizer = policy.tokenizer.backend_tokenizer
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    if max(encoding.ids, default=0) >= policy.vocabulary:
        raise BadRequest("the tokenizer makes ids of this text that the model does not know", param)
    return encoding.ids


def _checked(ids: list[int], policy: Policy, param: str) -> list[int]:
    if not ids:
        raise BadRequest("the prompt is empty", param)
    if len(ids) >= policy.max_positions:
        context = f"the context of {policy.max_positions} leaves no room for an answer"
        raise BadRequest(f"the prompt has {len(ids)} tokens; {context}", param, "context_length_exceeded")
    return ids


def _with_text(message: Json, index: int) -> Json:
    """Content given as parts becomes one text: templates know texts."""
    if not isinstance(message.get("role"), str):
        raise BadRequest("a message needs a role", f"messages[{index}].role")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    parts = content if isinstance(content, list) else [None]
    found = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) != len(parts):
        raise BadRequest("content must be a text or a list of text parts", f"messages[{index}].content")
    return {**message, "content": "".join(texts)}
