"""Plain completions of texts or token ids, whole and streamed."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import uuid4

from fulgurite.streams.policy_server.answers import Asked
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.prompts import completion_prompts
from fulgurite.streams.policy_server.protocol import (
    Json,
    check_model,
    flag,
    integer,
    only_sampled_logprob,
    parse_sampling,
    parse_usage_asked,
)
from fulgurite.streams.policy_server.underway import Delta

_MAX_TOKENS = 16
"""Where a request does not say: OpenAI's default for this route, and vLLM's."""


@dataclass(frozen=True, kw_only=True)
class CompletionAsked(Asked):
    offsets: dict[int, int] = field(default_factory=dict)
    """Characters of the tokens that a choice's chunks have named so far."""

    def body(self) -> Json:
        choices = [self._choice(delta) for delta in self.choices()]
        return self._head() | {"choices": choices, "usage": self.usage()}

    def chunk(self, delta: Delta) -> Json:
        return self._head() | {"choices": [self._choice(delta)]}

    def usage_chunk(self) -> Json:
        return self._head() | {"choices": [], "usage": self.usage()}

    def _head(self) -> Json:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _choice(self, delta: Delta) -> Json:
        choice: Json = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta) if self.logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.token_ids:
            choice["token_ids"] = delta.tokens
            if delta.start == 0:
                choice["prompt_token_ids"] = self.generations[delta.index].prompt
        if self.weight_versions and delta.finish_reason is not None:
            choice["weight_versions"] = self.spans(delta)
        return choice

    def _logprobs(self, delta: Delta) -> Json:
        texts = [self.policy.token_text(token) for token in delta.tokens]
        offsets: list[int] = []
        offset = self.offsets.get(delta.index, 0)
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self.offsets[delta.index] = offset
        return {
            "text_offset": offsets,
            "token_logprobs": delta.logprobs,
            "tokens": texts,
            "top_logprobs": [{text: logprob} for text, logprob in zip(texts, delta.logprobs, strict=True)],
        }


def parse_completion(body: Json, policy: Policy, served_model_name: str, max_new_tokens: int) -> CompletionAsked:
    """Raises BadRequest."""
    check_model(body, served_model_name)
    sampling = parse_sampling(body, integer(body, "max_tokens", 1) if "max_tokens" in body else _MAX_TOKENS)
    return CompletionAsked(
        id=f"cmpl-{uuid4().hex}",
        model=served_model_name,
        policy=policy,
        generations=[
            generation
            for prompt in completion_prompts(body, sampling.n, policy)
            for generation in sampling.generations(prompt, policy, max_new_tokens, text=True)
        ],
        stream=flag(body, "stream", False),
        usage_asked=parse_usage_asked(body),
        logprobs=only_sampled_logprob(body),
        token_ids=flag(body, "return_token_ids", False),
        weight_versions=flag(body, "return_weight_versions", False),
        n=sampling.n,
    )
