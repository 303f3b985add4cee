"""Demonstrations: a file of what the policy shall say, made tokens once, before the run's first transaction.

    trainer.demonstrations ─► tokens, with a mask over what is to be learned ─► <run>/demonstrations-….jsonl ─► windows

One JSON object a line, in one of five forms:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …], "tools": […]}
        by the model's chat template; every message of the assistant is learned
    {"prompt": "…", "completion": "…"}                          the completion and the end of the text are learned
    {"prompt": [{…}, …], "completion": [{…}, …]}                one conversation: the completion's assistant is learned
    {"prompt_token_ids": [1, 2], "response_token_ids": [3]}     the response is learned
    {"rollout_id": "…", "status": "succeeded", "sequences": […], …}    a trajectory: what was sampled in it is learned;
                                                                        also within {"value": …}, as `tail` writes it

Promises: what a run trains on does not change when the file does (`kept.py`). A line that cannot be used
ends the start with its number, before a model is loaded. Which of them a step trains on is demonstrating.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import BaseModel

from fulgurite.schemas.codec import decode
from fulgurite.schemas.errors import InvalidEvent, SettingsError
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.trainer.kept import keep, kept
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.samples import ModelLimits, read_limits, token_fault

DEMONSTRATIONS = "demonstrations"

MAX_DEMONSTRATIONS = 1_000_000
MAX_LINE_BYTES = 16 << 20


class Demonstration(BaseModel):
    """A line of the run's own file."""

    token_ids: list[int]
    loss_mask: list[int]


class Tokenizer(Protocol):
    """What is used of Hugging Face's."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[Any], *, tools: Any, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> list[int]: ...


def prepare(plan: Plan) -> str:
    """Makes tokens of the file, writes the run's own and returns its name. Raises SettingsError: which line, and what
    is wrong."""
    path, model = plan.trainer.demonstrations, plan.start_model
    assert path is not None
    assert model is not None
    return keep(plan.folder, DEMONSTRATIONS, _Reading(path, model, read_limits(model)).all())


def prepared(plan: Plan, name: str) -> Iterator[Demonstration]:
    """What `prepare` wrote. `name` is empty in checkpoints of before. Raises StartError."""
    return kept(plan.folder / (name or f"{DEMONSTRATIONS}.jsonl"), Demonstration)


class _Reading:
    """The user's file, line by line."""

    def __init__(self, path: Path, model: Path, limits: ModelLimits) -> None:
        self._path = path
        self._model = model
        self._limits = limits
        self._tokenizer: Tokenizer | None = None

    def all(self) -> Iterator[Demonstration]:
        is_empty = True
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if number > MAX_DEMONSTRATIONS or len(line) > MAX_LINE_BYTES:
                        bound = f"{MAX_DEMONSTRATIONS} lines of {MAX_LINE_BYTES} bytes"
                        raise SettingsError(f"{self._where(number)}: more than {bound}")
                    for demonstration in self._line(number, line) if line.strip() else ():
                        is_empty = False
                        yield demonstration
        except OSError as error:
            raise SettingsError(f"trainer.demonstrations = {self._path}: {error}") from None
        if is_empty:
            raise SettingsError(f"trainer.demonstrations = {self._path}: there is none in it")

    def _where(self, number: int) -> str:
        return f"trainer.demonstrations = {self._path}, line {number}"

    def _line(self, number: int, line: bytes) -> list[Demonstration]:
        try:
            found = self._parsed(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            for demonstration in found:
                self._check(demonstration)
        except (ValueError, TypeError, RecursionError, InvalidEvent) as error:
            raise SettingsError(f"{self._where(number)}: {error}") from None
        return found

    def _check(self, demonstration: Demonstration) -> None:
        ids, mask = demonstration.token_ids, demonstration.loss_mask
        if not any(mask):
            raise ValueError("there is nothing to learn in it")
        fault = token_fault(TokenSequence(token_ids=ids, loss_mask=mask, logprobs=[0.0] * len(ids)), self._limits)
        if fault:
            raise ValueError(fault)

    def _parsed(self, line: str) -> list[Demonstration]:
        given = json.loads(line)
        if not isinstance(given, dict):
            raise ValueError("must be an object")
        fields = cast("dict[str, Any]", given)
        if isinstance(inner := fields.get("value"), dict):  # as `fulgurite tail --full` writes a record
            fields = cast("dict[str, Any]", inner)
        if "sequences" in fields:
            trajectory = decode(Trajectory, json.dumps(fields).encode())
            sequences = [sequence for sequence in trajectory.sequences if any(sequence.loss_mask)]
            return [Demonstration(token_ids=s.token_ids, loss_mask=s.loss_mask) for s in sequences]
        if "messages" in fields:
            return [self._conversation(_messages(fields["messages"], "messages"), fields.get("tools"))]
        if "prompt_token_ids" in fields and "response_token_ids" in fields:
            return [masked(_ids(fields, "prompt_token_ids"), _ids(fields, "response_token_ids"))]
        if "prompt" in fields and "completion" in fields:
            return [self._completion(fields)]
        raise ValueError(
            "must have messages, prompt and completion, prompt_token_ids and response_token_ids, or sequences"
        )

    def _completion(self, fields: Mapping[str, Any]) -> Demonstration:
        before, after = fields["prompt"], fields["completion"]
        if isinstance(before, list) and isinstance(after, list):
            given, said = _messages(before, "prompt"), _messages(after, "completion")
            return self._conversation([*given, *said], fields.get("tools"), len(given))
        if not isinstance(before, str) or not isinstance(after, str):
            kinds = f"{type(before).__name__} and {type(after).__name__}"
            raise ValueError(f"prompt and completion must be two texts or two lists of messages, not {kinds}")
        tokenizer = self._loaded()
        prompt = tokenizer.encode(before, add_special_tokens=True)
        completion = tokenizer.encode(after, add_special_tokens=False)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return masked(prompt, completion + end)

    def _conversation(self, said: list[Any], tools: Any, given: int = 0) -> Demonstration:
        """given: so many messages at the beginning are not learned, whoever says them."""
        roles = [message["role"] for message in said]
        whole = self._rendered(said, tools, False)
        mask = [0] * len(whole)
        for at in [at for at, role in enumerate(roles) if role == "assistant" and at >= given]:
            before = self._rendered(said[:at], tools, True)
            until = self._rendered(said[: at + 1], tools, False)
            if until[: len(before)] != before or whole[: len(until)] != until:
                raise ValueError(
                    f"messages[{at}]: the chat template writes a conversation otherwise when it goes on, so what the "
                    "assistant says cannot be told from what it is given; give token ids instead"
                )
            mask[len(before) : len(until)] = [1] * (len(until) - len(before))
        return Demonstration(token_ids=whole, loss_mask=mask)

    def _rendered(self, messages: list[Any], tools: Any, prompt: bool) -> list[int]:
        try:
            return self._loaded().apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=False
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses the messages: {error}") from None

    def _loaded(self) -> Tokenizer:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            load: Any = AutoTokenizer.from_pretrained
            try:
                self._tokenizer = cast(Tokenizer, load(self._model))
            except (OSError, ValueError) as error:
                raise SettingsError(f"trainer.model = {self._model}: its tokenizer cannot be loaded: {error}") from None
        return self._tokenizer


def masked(prompt: list[int], response: list[int]) -> Demonstration:
    """Tokens given, then tokens to be learned."""
    return Demonstration(token_ids=[*prompt, *response], loss_mask=[0] * len(prompt) + [1] * len(response))


def _ids(fields: Mapping[str, Any], name: str) -> list[int]:
    """Raises ValueError for what is no list of integers."""
    given = fields[name]
    if not isinstance(given, list) or any(type(each) is not int for each in cast("list[Any]", given)):
        raise ValueError(f"{name} must be a list of integers")
    return cast("list[int]", given)


def _messages(given: Any, name: str) -> list[Any]:
    """Raises ValueError for what a chat template would write down as Python does: null as None, 7 as 7."""
    if not isinstance(given, list):
        raise ValueError(f"{name} must be a list")
    said = cast("list[Any]", given)
    for at, each in enumerate(said):
        message = cast("dict[str, Any]", each) if isinstance(each, dict) else {}
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{name}[{at}] must be an object with a role and content")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"{name}[{at}]: content must be a text or a list of parts; without one, tool_calls")
    return said
