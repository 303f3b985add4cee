"""What a generating route makes of a request: generations to run, and the shapes of their answer, whole or streamed.

chat.py, completions.py and generate.py each fill this in for one protocol of vLLM. Token ids include the
end-of-sequence token and those of a stop string, texts include neither, as with vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fulgurite.streams.policy_server.engine import Generation
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.protocol import Json, version_spans
from fulgurite.streams.policy_server.underway import Delta


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, parsed. `generations` holds n for each prompt, in order."""

    id: str
    model: str
    policy: Policy
    generations: Sequence[Generation]
    stream: bool
    usage_asked: bool
    logprobs: bool
    token_ids: bool
    weight_versions: bool
    n: int
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self) -> Json:
        """The whole answer, when all generations have finished."""
        raise NotImplementedError

    def first_chunks(self) -> list[Json]:
        """Sent before the first delta."""
        return []

    def chunk(self, delta: Delta) -> Json:
        raise NotImplementedError

    def usage_chunk(self) -> Json:
        """Sent at the end where it was asked for."""
        raise NotImplementedError

    def choices(self) -> list[Delta]:
        """Whole generations in the shape of a delta, so that both forms of an answer are written by one function."""
        return [
            Delta(
                index=index,
                start=0,
                tokens=generation.tokens,
                logprobs=generation.logprobs,
                text=generation.text.take(finished=True) if generation.text is not None else "",
                finish_reason=generation.finish_reason,
                stop_reason=generation.stop_reason,
            )
            for index, generation in enumerate(self.generations)
        ]

    def usage(self) -> Json:
        """Each prompt counts once, however many answers it got."""
        prompt = sum(len(generation.prompt) for generation in self.generations[:: self.n])
        completion = sum(len(generation.tokens) for generation in self.generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def spans(self, delta: Delta) -> list[Json] | None:
        """Which version sampled which tokens of the whole generation: known at its end."""
        return version_spans(self.generations[delta.index]) if delta.finish_reason is not None else None

    def text_logprobs(self, delta: Delta) -> Json:
        """As chat completions write them."""
        content: list[Json] = []
        for token, logprob in zip(delta.tokens, delta.logprobs, strict=True):
            text = self.policy.token_text(token)
            content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
        return {"content": content}
