"""The shapes of the wire: OpenAI's chat completions with vLLM's additions, and errors as OpenAI writes them.

Promises: a request becomes a Generation or a BadRequest that names the field; parameters that would change what is
sampled and are not supported are refused, all others are ignored. Knows nothing of HTTP or of the engine's state.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import orjson
from jinja2.exceptions import TemplateError

from fulgurite.streams.policy_server.engine import Generation
from fulgurite.streams.policy_server.policy import Policy

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
MAX_MESSAGES: Final = 4_096
_MAX_TEMPERATURE = 100.0

Json = dict[str, Any]

# Parameters with one value that means "as usual": any other would need sampling that this server does not do.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "stop_token_ids": ([],),
    "min_tokens": (0,),
    "ignore_eos": (False,),
}


class BadRequest(Exception):
    """Answered with 400. `param` names the field, `code` is a constant that clients compare with."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Json:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse_json(body: bytes) -> Json:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


@dataclass(frozen=True)
class ChatRequest:
    generation: Generation
    logprobs: bool
    token_ids: bool
    weight_versions: bool


def parse_chat(body: Json, policy: Policy, served_model_name: str, max_new_tokens: int) -> ChatRequest:
    """Raises BadRequest."""
    for name, allowed in _ONLY.items():
        value = body.get(name)
        if value is not None and value not in allowed:
            raise BadRequest(f"{name} = {value!r} is not supported here, only {allowed[0]!r}", name)
    model = body.get("model", served_model_name)
    if model != served_model_name:
        raise BadRequest(f"there is no model {model!r}; served is {served_model_name!r}", "model", "model_not_found")
    prompt = _prompt_ids(body, policy)
    room = policy.max_positions - len(prompt)
    if room < 1:
        raise BadRequest(
            f"the prompt has {len(prompt)} tokens; the context of {policy.max_positions} leaves no room for an answer",
            "messages",
            "context_length_exceeded",
        )
    asked = _integer(body, "max_completion_tokens", 1) or _integer(body, "max_tokens", 1) or max_new_tokens
    return ChatRequest(
        generation=Generation(
            prompt=prompt,
            max_tokens=min(asked, max_new_tokens, room),
            temperature=_temperature(body),
            seed=_integer(body, "seed", None),
        ),
        logprobs=body.get("logprobs") is True,
        token_ids=body.get("return_token_ids") is True,
        weight_versions=body.get("return_weight_versions") is True,
    )


def _prompt_ids(body: Json, policy: Policy) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise BadRequest("messages must be a list of at least one object", "messages")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"more than {MAX_MESSAGES} messages", "messages")
    plain = [_with_text(message, index) for index, message in enumerate(messages)]
    tools = body.get("tools") or None
    try:
        # TypeError: what a template raises when it adds a text and something that is none.
        text = policy.tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRequest(f"the chat template refuses these messages: {error}", "messages") from None
    assert isinstance(text, str)
    ids: list[int] = policy.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise BadRequest("the messages make an empty prompt", "messages")
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


def _integer(body: Json, name: str, least: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        raise BadRequest(f"{name} must be an integer" + (f" of at least {least}" if least is not None else ""), name)
    return value


def _temperature(body: Json) -> float:
    value = body.get("temperature")
    if value is None:
        return 1.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MAX_TEMPERATURE:
        raise BadRequest(f"temperature must be a number from 0 to {_MAX_TEMPERATURE:g}", "temperature")
    return float(value)


def chat_body(request: ChatRequest, policy: Policy, served_model_name: str) -> Json:
    """The answer. Token ids include the end-of-sequence token, the text does not, as with vLLM."""
    generation = request.generation
    choice: Json = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": policy.tokenizer.decode(generation.tokens, skip_special_tokens=True),
        },
        "logprobs": {"content": _logprobs(generation, policy)} if request.logprobs else None,
        "finish_reason": generation.finish_reason,
    }
    body: Json = {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": served_model_name,
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(generation.prompt),
            "completion_tokens": len(generation.tokens),
            "total_tokens": generation.length,
        },
    }
    if request.token_ids:
        body["prompt_token_ids"] = generation.prompt
        choice["token_ids"] = generation.tokens
    if request.weight_versions:
        choice["weight_versions"] = version_spans(generation)
    return body


def version_spans(generation: Generation) -> list[Json]:
    """[{"version": "17", "start": 0, "end": 12}, …]: half-open, without gaps, in order."""
    starts = [start for _, start in generation.versions] + [len(generation.tokens)]
    return [
        {"version": version, "start": start, "end": end}
        for (version, start), end in zip(generation.versions, starts[1:], strict=True)
    ]


def _logprobs(generation: Generation, policy: Policy) -> list[Json]:
    found: list[Json] = []
    for token, logprob in zip(generation.tokens, generation.logprobs, strict=True):
        text = policy.token_text(token)
        found.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return found
