"""Chat completions, whole and streamed, and their rendering: the request that /inference/v1/generate would take."""

from __future__ import annotations

from uuid import uuid4

from fulgurite.streams.policy_server.answers import Asked
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.prompts import chat_prompt
from fulgurite.streams.policy_server.protocol import (
    Json,
    Sampling,
    check_model,
    flag,
    integer,
    parse_sampling,
    parse_usage_asked,
)
from fulgurite.streams.policy_server.underway import Delta


class ChatAsked(Asked):
    def body(self) -> Json:
        choices: list[Json] = []
        for delta in self.choices():
            message = {"role": "assistant", "content": delta.text}
            choices.append({"index": delta.index, "message": message, **self._rest(delta)})
        body = self._head("chat.completion") | {"choices": choices, "usage": self.usage()}
        if self.token_ids:
            body["prompt_token_ids"] = self.generations[0].prompt
        return body

    def first_chunks(self) -> list[Json]:
        chunks: list[Json] = []
        for index in range(self.n):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            chunks.append(self._head("chat.completion.chunk") | {"choices": [choice]})
            if self.token_ids:
                chunks[-1]["prompt_token_ids"] = self.generations[0].prompt
        return chunks

    def chunk(self, delta: Delta) -> Json:
        choice: Json = {"index": delta.index, "delta": {"content": delta.text}, **self._rest(delta)}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def usage_chunk(self) -> Json:
        return self._head("chat.completion.chunk") | {"choices": [], "usage": self.usage()}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _rest(self, delta: Delta) -> Json:
        rest: Json = {
            "logprobs": self.text_logprobs(delta) if self.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            rest["stop_reason"] = delta.stop_reason
            if self.weight_versions:
                rest["weight_versions"] = self.spans(delta)
        if self.token_ids:
            rest["token_ids"] = delta.tokens
        return rest


def parse_chat(body: Json, policy: Policy, served_model_name: str, max_new_tokens: int) -> ChatAsked:
    """Raises BadRequest."""
    check_model(body, served_model_name)
    sampling = _sampling(body)
    return ChatAsked(
        id=f"chatcmpl-{uuid4().hex}",
        model=served_model_name,
        policy=policy,
        generations=sampling.generations(chat_prompt(body, policy), policy, max_new_tokens, text=True),
        stream=flag(body, "stream", False),
        usage_asked=parse_usage_asked(body),
        logprobs=flag(body, "logprobs", False),
        token_ids=flag(body, "return_token_ids", False),
        weight_versions=flag(body, "return_weight_versions", False),
        n=sampling.n,
    )


def render_chat(body: Json, policy: Policy, served_model_name: str, max_new_tokens: int) -> Json:
    """Raises BadRequest."""
    check_model(body, served_model_name)
    sampling = _sampling(body)
    prompt = chat_prompt(body, policy)
    return {
        "request_id": f"chatcmpl-{uuid4().hex}",
        "token_ids": prompt,
        "sampling_params": {
            "n": sampling.n,
            "max_tokens": sampling.most(prompt, policy, max_new_tokens),
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "logprobs": 0 if flag(body, "logprobs", False) else None,
        },
        "model": body.get("model"),
        "stream": flag(body, "stream", False),
        "stream_options": body.get("stream_options"),
    }


def _sampling(body: Json) -> Sampling:
    most = integer(body, "max_completion_tokens", 1) or integer(body, "max_tokens", 1)
    return parse_sampling(body, most)
