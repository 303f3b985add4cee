"""Token ids in, token ids out, each span with the version that sampled it: vLLM's /inference/v1/generate.

`output_mode` text adds texts and logprobs in the shape of chat completions.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import uuid4

from fulgurite.streams.policy_server.answers import Asked
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.prompts import ids_prompt
from fulgurite.streams.policy_server.protocol import (
    BadRequest,
    Json,
    check_model,
    flag,
    integer,
    only_sampled_logprob,
    parse_sampling,
    parse_usage_asked,
)
from fulgurite.streams.policy_server.underway import Delta

_MAX_ID_CHARS = 256


@dataclass(frozen=True, kw_only=True)
class GenerateAsked(Asked):
    text: bool

    def body(self) -> Json:
        choices = [self._choice(delta) for delta in self.choices()]
        body = self._head() | {"model": self.model, "created": self.created, "usage": self.usage(), "choices": choices}
        if self.token_ids:
            body["prompt_token_ids"] = self.generations[0].prompt
        return body

    def chunk(self, delta: Delta) -> Json:
        chunk = self._head() | {"usage": None, "choices": [self._choice(delta)]}
        if self.token_ids and delta.index == delta.start == 0:
            chunk["prompt_token_ids"] = self.generations[0].prompt
        return chunk

    def usage_chunk(self) -> Json:
        return self._head() | {"choices": [], "usage": self.usage()}

    def _head(self) -> Json:
        return {"request_id": self.id, "output_mode": "text" if self.text else "tokens"}

    def _choice(self, delta: Delta) -> Json:
        choice: Json = {
            "index": delta.index,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": delta.tokens,
            "weight_versions": self.spans(delta),
            "logprobs": None,
        }
        if self.text:
            choice["text"] = delta.text
        if self.logprobs:
            choice["logprobs"] = self.text_logprobs(delta) if self.text else _token_logprobs(delta)
        return choice


def _token_logprobs(delta: Delta) -> Json:
    content = [
        {"token_id": token, "logprob": logprob, "rank": None, "top_logprobs": []}
        for token, logprob in zip(delta.tokens, delta.logprobs, strict=True)
    ]
    return {"content": content}


def parse_generate(body: Json, policy: Policy, served_model_name: str, max_new_tokens: int) -> GenerateAsked:
    """Raises BadRequest."""
    check_model(body, served_model_name)
    params = body.get("sampling_params")
    if not isinstance(params, dict):
        raise BadRequest("sampling_params must be an object", "sampling_params")
    mode = body.get("output_mode") or "tokens"
    if mode not in ("tokens", "text"):
        raise BadRequest(f"output_mode must be tokens or text, not {mode!r}", "output_mode")
    sampling = parse_sampling(params, integer(params, "max_tokens", 1))
    prompt = ids_prompt(body.get("token_ids"), policy, "token_ids")
    text = mode == "text"
    return GenerateAsked(
        id=f"generate-tokens-{_request_id(body)}",
        model=served_model_name,
        policy=policy,
        generations=sampling.generations(prompt, policy, max_new_tokens, text=text),
        stream=flag(body, "stream", False),
        usage_asked=parse_usage_asked(body),
        logprobs=only_sampled_logprob(params),
        token_ids=flag(body, "return_token_ids", False),
        weight_versions=True,
        n=sampling.n,
        text=text,
    )


def _request_id(body: Json) -> str:
    value = body.get("request_id")
    if value is None:
        return uuid4().hex
    if not isinstance(value, str) or not 1 <= len(value) <= _MAX_ID_CHARS:
        raise BadRequest(f"request_id must be a text of 1 to {_MAX_ID_CHARS} characters", "request_id")
    return value
