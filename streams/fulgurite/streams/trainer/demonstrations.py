"""Demonstrations: a file of what the policy shall say, made tokens once, before the run's first transaction.

    trainer.demonstrations ─► tokens, with a mask over what is to be learned ─► <run>/demonstrations.jsonl ─► windows

One JSON object a line, in one of four forms:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …], "tools": […]}
        by the model's chat template; every message of the assistant is learned
    {"prompt": "…", "completion": "…"}                          the completion and the end of the text are learned
    {"prompt_token_ids": [1, 2], "response_token_ids": [3]}     the response is learned
    {"rollout_id": "…", "status": "succeeded", "sequences": […], …}    a trajectory: what was sampled in it is learned;
                                                                        also within {"value": …}, as `tail` writes it

Promises: what a run trains on does not change when the file does. A line that cannot be used ends the start with its
number, before a model is loaded. Which of them a step trains on is demonstrating.py's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import BaseModel

from fulgurite.schemas.codec import decode
from fulgurite.schemas.errors import InvalidEvent, SettingsError, StartError
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.samples import ModelLimits, read_limits, token_fault

DEMONSTRATIONS = "demonstrations.jsonl"

MAX_DEMONSTRATIONS = 1_000_000
MAX_LINE_CHARS = 16 << 20


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


def prepare(plan: Plan) -> None:
    """Makes tokens of the file and writes the run's own. Raises SettingsError: which line, and what is wrong."""
    path, model = plan.trainer.demonstrations, plan.start_model
    assert path is not None
    assert model is not None
    limits = read_limits(model)
    reading = _Reading(path, model, limits)
    count = 0
    target = plan.folder / DEMONSTRATIONS
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("w") as file:
        for demonstration in reading.all():
            file.write(demonstration.model_dump_json() + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    if not count:
        temporary.unlink()
        raise SettingsError(f"trainer.demonstrations = {path}: there is none in it")
    temporary.rename(target)


def prepared(plan: Plan) -> Iterator[Demonstration]:
    """What `prepare` wrote. Raises StartError."""
    path = plan.folder / DEMONSTRATIONS
    try:
        with path.open() as file:
            for line in file:
                yield Demonstration.model_validate_json(line)
    except (OSError, ValueError) as error:
        raise StartError(f"what the run is to learn from, {path}, cannot be read: {error}") from error


class _Reading:
    """The user's file, line by line."""

    def __init__(self, path: Path, model: Path, limits: ModelLimits) -> None:
        self._path = path
        self._model = model
        self._limits = limits
        self._tokenizer: Tokenizer | None = None

    def all(self) -> Iterator[Demonstration]:
        try:
            with self._path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if number > MAX_DEMONSTRATIONS or len(line) > MAX_LINE_CHARS:
                        bound = f"{MAX_DEMONSTRATIONS} lines of {MAX_LINE_CHARS} characters"
                        raise SettingsError(f"{self._where(number)}: more than {bound}")
                    if line.strip():
                        yield from self._line(number, line)
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"trainer.demonstrations = {self._path}: {error}") from None

    def _where(self, number: int) -> str:
        return f"trainer.demonstrations = {self._path}, line {number}"

    def _line(self, number: int, line: str) -> list[Demonstration]:
        try:
            found = self._parsed(line)
            for demonstration in found:
                self._check(demonstration)
        except (ValueError, InvalidEvent) as error:
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
            return [self._conversation(fields["messages"], fields.get("tools"))]
        if "prompt_token_ids" in fields and "response_token_ids" in fields:
            return [masked(fields["prompt_token_ids"], fields["response_token_ids"])]
        if "prompt" in fields and "completion" in fields:
            return [self._completion(fields)]
        raise ValueError(
            "must have messages, prompt and completion, prompt_token_ids and response_token_ids, or sequences"
        )

    def _completion(self, fields: Mapping[str, Any]) -> Demonstration:
        tokenizer = self._loaded()
        prompt = tokenizer.encode(str(fields["prompt"]), add_special_tokens=True)
        completion = tokenizer.encode(str(fields["completion"]), add_special_tokens=False)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return masked(prompt, completion + end)

    def _conversation(self, messages: Any, tools: Any) -> Demonstration:
        if not isinstance(messages, list):
            raise ValueError("messages must be a list")
        said = cast("list[Any]", messages)
        roles = [message.get("role") if isinstance(message, dict) else None for message in said]
        whole = self._rendered(said, tools, False)
        mask = [0] * len(whole)
        for at in [at for at, role in enumerate(roles) if role == "assistant"]:
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
