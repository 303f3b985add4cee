"""Continuous batching of many generations on one CPU model, one step at a time.

    waiting ──prefill──► rows of the cache ──decode, one token a step──► finished
       ▲                       │
       └────── swap: rows give up their cache and are prefilled again, prompt and what was generated

Promises: the logprob of a token is the model's own log-softmax at that token, the distribution it was sampled from
when the temperature is 1; every token carries the version that was set when it was sampled; after `swap` no token is
computed from keys or values of the old weights; a stop string ends a generation at the token that completes it. A step
takes one forward for what is new and one for what runs.

Why not transformers' ContinuousBatchingManager: it takes sampling or greedy for a whole manager (temperature alone is
per request), reports logprobs after its temperature, does not say where weights changed, and was measured at three
quarters of this throughput. Not thread-safe: whoever drives it calls one method at a time.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import torch

from fulgurite.streams.policy_server.cache import decode_mask, prefill_mask
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.text import GeneratedText

MAX_ROWS = 64
"""Generations under way at once."""
MAX_CACHED_TOKENS = 65_536
"""Rows times the longest of them: bounds the cache's memory (1.6 GB for a half-billion-parameter model)."""
MAX_PREFILL_TOKENS = 4_096
"""Padded tokens of one prefill: bounds how long a step can take."""

FinishReason = Literal["stop", "length", "abort"]


@dataclass(eq=False)
class Generation:
    """One request, and what became of it so far."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    seed: int | None = None
    text: GeneratedText | None = None
    """Reads along, where somebody wants text; its stop strings end the generation."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[str, int]] = field(default_factory=list)
    """(version, index of the first token sampled by it), in order."""
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    """The stop string that ended it."""
    generator: torch.Generator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.seed is not None:
            self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def final_length(self) -> int:
        return len(self.prompt) + self.max_tokens


class Engine:
    def __init__(self, policy: Policy, version: str) -> None:
        self.policy = policy
        self.version = version
        self.tokens_sampled = 0
        """In all, those of cancelled generations included."""
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self._cache = policy.new_cache()
        self._noise = torch.Generator()
        # Not torch's default generator: that starts alike in every process, and two servers would sample alike.
        self._noise.seed()

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, generation: Generation) -> None:
        self.waiting.append(generation)

    def swap(self, policy: Policy, version: str) -> None:
        """New weights for every token from now on; generations under way lose their cache and keep their tokens."""
        self.policy, self.version = policy, version
        self._cache = policy.new_cache()
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()

    @torch.inference_mode()
    def cancel(self, generation: Generation) -> None:
        """Forgets it, wherever it is."""
        generation.finish_reason = "abort"
        if generation in self.waiting:
            self.waiting.remove(generation)
        self._take_finished()

    def abort(self) -> list[Generation]:
        """Ends everything that runs or waits; each keeps what it has."""
        ended = [*self.running, *self.waiting]
        for generation in ended:
            generation.finish_reason = "abort"
        self.running.clear()
        self.waiting.clear()
        return ended

    @torch.inference_mode()
    def step(self, admit: bool = True) -> list[Generation]:
        """One token for every row, after what waits got a row if there is room. Gives what finished."""
        finished: list[Generation] = []
        admitted = self._admit() if admit else []
        if admitted:
            self._prefill(admitted)
            finished += self._take_finished()
        if self.running:
            self._decode()
            finished += self._take_finished()
        return finished

    def _admit(self) -> list[Generation]:
        """From the front of the queue, as far as rows, cache and prefill allow; at least one if none runs."""
        admitted: list[Generation] = []
        longest = max((g.final_length for g in self.running), default=0)
        width = 0
        while self.waiting:
            candidate = self.waiting[0]
            rows = len(self.running) + len(admitted) + 1
            longest = max(longest, candidate.final_length)
            width = max(width, candidate.length)
            full = (
                rows > MAX_ROWS
                or rows * longest > MAX_CACHED_TOKENS
                or (len(admitted) + 1) * width > MAX_PREFILL_TOKENS
            )
            if full and (self.running or admitted):
                break
            admitted.append(self.waiting.popleft())
        return admitted

    def _prefill(self, admitted: list[Generation]) -> None:
        lengths = [generation.length for generation in admitted]
        width = max(lengths)
        ids = torch.tensor([[*g.prompt, *g.tokens, *[0] * (width - g.length)] for g in admitted])
        first = len(self.running)
        self.running += admitted
        self._cache.reserve(len(self.running), max(g.final_length for g in self.running))
        self._cache.prepare_prefill(first, len(admitted), width)
        positions = torch.arange(width)[None]
        last = torch.tensor(lengths) - 1
        self._sample(admitted, self.policy.forward(ids, positions, prefill_mask(width), last, self._cache))

    def _decode(self) -> None:
        running = self.running
        ids = torch.tensor([[generation.tokens[-1]] for generation in running])
        positions = torch.tensor([generation.length - 1 for generation in running])
        length = max(generation.length for generation in running)
        self._cache.prepare_decode(positions, length)
        mask = decode_mask(positions, length)
        only = torch.zeros(len(running), dtype=torch.long)
        self._sample(running, self.policy.forward(ids, positions[:, None], mask, only, self._cache))

    def _sample(self, generations: list[Generation], logits: torch.Tensor) -> None:
        """Gumbel-max: the argmax of logits / temperature + Gumbel noise is a sample; without noise it is greedy."""
        logprobs = torch.log_softmax(logits, dim=-1)
        scores = logits
        if any(generation.temperature > 0 for generation in generations):
            scale = torch.tensor([[1.0 / g.temperature if g.temperature > 0 else 1.0] for g in generations])
            noisy = torch.tensor([[1.0 if g.temperature > 0 else 0.0] for g in generations])
            exponential = torch.empty_like(logits).exponential_(generator=self._noise)
            for row, generation in enumerate(generations):
                if generation.generator is not None:
                    exponential[row].exponential_(generator=generation.generator)
            scores = logits * scale - exponential.log_() * noisy
        chosen = scores.argmax(dim=-1, keepdim=True)
        tokens = chosen[:, 0].tolist()
        chosen_logprobs = logprobs.gather(1, chosen)[:, 0].tolist()
        for generation, token, logprob in zip(generations, tokens, chosen_logprobs, strict=True):
            self._append(generation, token, logprob)

    def _append(self, generation: Generation, token: int, logprob: float) -> None:
        if not math.isfinite(logprob):
            raise ArithmeticError(f"version {self.version} gave a logprob of {logprob}")
        if not generation.versions or generation.versions[-1][0] != self.version:
            generation.versions.append((self.version, len(generation.tokens)))
        self.tokens_sampled += 1
        generation.tokens.append(token)
        generation.logprobs.append(logprob)
        ended = token in self.policy.stop_ids
        if generation.text is not None and not ended:
            generation.stop_reason = generation.text.append(token)
        if ended or generation.stop_reason is not None:
            generation.finish_reason = "stop"
        elif len(generation.tokens) >= generation.max_tokens:
            generation.finish_reason = "length"

    def _take_finished(self) -> list[Generation]:
        """Takes finished rows out; the last row moves into each gap, so that rows stay dense."""
        finished: list[Generation] = []
        row = 0
        while row < len(self.running):
            if self.running[row].finish_reason is None:
                row += 1
                continue
            finished.append(self.running[row])
            last = self.running.pop()
            if row < len(self.running):
                self.running[row] = last
                self._cache.move(source=len(self.running), target=row)
        return finished
