"""Answers as vLLM 0.32 gives them, whole and as events, for the fake policy server. Pure functions.

Every token is the number of the weights; its logprob is -0.125 times its place, from 1. The texts are `answer N` for
choice N; a call that offers tools, and does not bring a tool's result, is answered by calling the first of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

PROMPT_IDS = [1, 2, 3, 4]


@dataclass(frozen=True)
class Sampled:
    """What the policy samples, for every choice."""

    ids: list[int]
    label: str | None
    gives_versions: bool

    def logprob(self, at: int) -> float:
        return -0.125 * (at + 1)

    @property
    def versions(self) -> list[Json]:
        return [{"version": str(self.label), "start": 0, "end": len(self.ids)}]


def sse(data: Json, event: str = "") -> bytes:
    return (f"event: {event}\n" if event else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def usage(choices: int, sampled: Sampled) -> Json:
    tokens = choices * len(sampled.ids)
    return {
        "prompt_tokens": len(PROMPT_IDS),
        "completion_tokens": tokens,
        "total_tokens": len(PROMPT_IDS) + tokens,
    }


def calls_tool(asked: Json) -> str:
    """The tool to call, empty for none."""
    tools = asked.get("tools") or []
    turns = asked.get("messages") or asked.get("input") or []
    answered = json.dumps(turns)
    if not tools or '"tool"' in answered or "tool_result" in answered or "function_call_output" in answered:
        return ""
    return str(tools[0].get("name") or tools[0].get("function", {}).get("name"))


def _token(sampled: Sampled, at: int) -> Json:
    return {"token": "x", "logprob": sampled.logprob(at), "bytes": [120], "top_logprobs": []}


# chat completions


def chat(asked: Json, sampled: Sampled) -> Json:
    tool = calls_tool(asked)
    choices: list[Json] = []
    for index in range(asked.get("n") or 1):
        message: Json = {"role": "assistant", "content": None if tool else f"answer {index}"}
        if tool:
            call = {"id": "call_1", "type": "function", "function": {"name": tool, "arguments": '{"city":"Bern"}'}}
            message["tool_calls"] = [call]
        choice: Json = {"index": index, "message": message, "finish_reason": "tool_calls" if tool else "stop"}
        tokens = [_token(sampled, at) for at in range(len(sampled.ids))]
        choice["logprobs"] = {"content": tokens} if asked.get("logprobs") else None
        if asked.get("return_token_ids"):
            choice["token_ids"] = sampled.ids
        if asked.get("return_weight_versions") and sampled.gives_versions:
            choice["weight_versions"] = sampled.versions
        choices.append(choice)
    body: Json = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "policy", "choices": choices}
    body["usage"] = usage(len(choices), sampled)
    return body | ({"prompt_token_ids": PROMPT_IDS} if asked.get("return_token_ids") else {})


def chat_events(asked: Json, sampled: Sampled) -> Iterator[bytes]:
    """A role chunk, a chunk a token, the finish reason in the last, usage, [DONE]; choices take turns."""
    count = asked.get("n") or 1
    tool = calls_tool(asked)
    base: Json = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "policy"}
    for index in range(count):
        first: Json = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        first["logprobs"] = None
        yield sse(
            base | {"choices": [first]} | ({"prompt_token_ids": PROMPT_IDS} if asked.get("return_token_ids") else {})
        )
    last = len(sampled.ids) - 1
    for at, token_id in enumerate(sampled.ids):
        for index in range(count):
            delta = _tool_delta(tool, at, last) if tool else {"content": _piece(f"answer {index}", at, last)}
            choice: Json = {"index": index, "delta": delta, "finish_reason": None}
            choice["logprobs"] = {"content": [_token(sampled, at)]} if asked.get("logprobs") else None
            choice["token_ids"] = [token_id] if asked.get("return_token_ids") else None
            if at == last:
                choice["finish_reason"] = "tool_calls" if tool else "stop"
                choice["stop_reason"] = None
                if asked.get("return_weight_versions") and sampled.gives_versions:
                    choice["weight_versions"] = sampled.versions
            yield sse(base | {"choices": [choice]})
    if (asked.get("stream_options") or {}).get("include_usage"):
        yield sse(base | {"choices": [], "usage": usage(count, sampled)})
    yield DONE


def _tool_delta(tool: str, at: int, last: int) -> Json:
    if at == 0:
        return {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": tool}}]}
    arguments = _piece('{"city":"Bern"}', at - 1, last - 1)
    # A token that the parser keeps to itself makes an empty delta, because token ids were asked for.
    return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]} if arguments else {}


def _piece(text: str, at: int, last: int) -> str:
    """The text of token `at`: a few characters each, the rest with the last."""
    each = max(1, len(text) // (last + 1))
    return text[at * each :] if at >= last else text[at * each : (at + 1) * each]


# completions


def completion(asked: Json, sampled: Sampled) -> Json:
    sampled = _hidden(asked, sampled)
    count = prompts(asked) * (asked.get("n") or 1)
    choices = [_text_choice(asked, sampled, index, range(len(sampled.ids))) for index in range(count)]
    for choice in choices:
        choice["finish_reason"] = "length"
        if asked.get("echo") and asked.get("logprobs") is not None:
            choice["prompt_logprobs"] = [None, *[{"1": {"logprob": -9.0}}] * (len(PROMPT_IDS) - 1)]
        if asked.get("return_weight_versions") and sampled.gives_versions:
            choice["weight_versions"] = sampled.versions
    base: Json = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "policy"}
    return base | {"choices": choices, "usage": usage(count, sampled)}


def completion_events(asked: Json, sampled: Sampled) -> Iterator[bytes]:
    sampled = _hidden(asked, sampled)
    count = prompts(asked) * (asked.get("n") or 1)
    base: Json = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "policy"}
    for at in range(len(sampled.ids)):
        for index in range(count):
            choice = _text_choice(asked, sampled, index, range(at, at + 1))
            if at == len(sampled.ids) - 1:
                choice["finish_reason"] = "length"
                if asked.get("return_weight_versions") and sampled.gives_versions:
                    choice["weight_versions"] = sampled.versions
            yield sse(base | {"choices": [choice]})
    if (asked.get("stream_options") or {}).get("include_usage"):
        yield sse(base | {"choices": [], "usage": usage(count, sampled)})
    yield DONE


def prompts(asked: Json) -> int:
    prompt = asked["prompt"]
    return 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)


def _hidden(asked: Json, sampled: Sampled) -> Sampled:
    """Asked for the prompt alone, vLLM samples one token all the same: it gives its id, and counts it."""
    if not asked.get("echo") or asked.get("max_tokens") != 0:
        return sampled
    return Sampled(sampled.ids[:1], sampled.label, sampled.gives_versions)


def _echoed_text(asked: Json, index: int) -> str:
    """Token ids are written as the words of their numbers."""
    prompt = asked["prompt"]
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    own = prompt[index // (asked.get("n") or 1)] if several else prompt
    return own if isinstance(own, str) else "".join(f"token {token} " for token in own)


def _text_choice(asked: Json, sampled: Sampled, index: int, places: range) -> Json:
    echoed = len(PROMPT_IDS) if asked.get("echo") and places.start == 0 else 0
    last = len(sampled.ids) - 1
    shown = range(0) if asked.get("echo") and asked.get("max_tokens") == 0 else places
    text = "".join(_piece(f"answer {index}", at, last) for at in shown)
    # vLLM takes token ids for enough.
    prompt = _echoed_text(asked, index) if echoed and not asked.get("return_token_ids") else ""
    choice: Json = {"index": index, "text": prompt + text, "finish_reason": None}
    choice["logprobs"] = None
    if asked.get("logprobs") is not None:
        found = [None, *[-9.0] * (echoed - 1)][:echoed] + [sampled.logprob(at) for at in shown]
        choice["logprobs"] = {"token_logprobs": found, "tokens": ["x"] * len(found), "top_logprobs": [{}] * len(found)}
    if asked.get("return_token_ids"):
        choice["token_ids"] = [sampled.ids[at] for at in places]
        choice["prompt_token_ids"] = PROMPT_IDS if places.start == 0 else None
    return choice


# responses


def response(asked: Json, sampled: Sampled, status: str = "completed") -> Json:
    tool = calls_tool(asked)
    wanted = "message.output_text.logprobs" in (asked.get("include") or [])
    logprobs = [_token(sampled, at) for at in range(len(sampled.ids))] if wanted else None
    part = {"type": "output_text", "text": "answer 0", "annotations": [], "logprobs": logprobs}
    item: Json = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    if tool:
        item = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": tool, "status": "completed"}
        item["arguments"] = '{"city":"Bern"}'
    body: Json = {"id": "resp_1", "object": "response", "created_at": 1, "model": "policy", "status": status}
    body |= {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "error": None, "incomplete_details": None}
    body |= {"output": [item] if status == "completed" else [], "usage": None}
    body |= {"input_messages": None, "output_messages": None}
    if status == "completed":
        body["usage"] = {
            "input_tokens": len(PROMPT_IDS),
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": len(sampled.ids),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(PROMPT_IDS) + len(sampled.ids),
        }
        if asked.get("enable_response_messages"):
            body["input_messages"] = [{"type": "raw_message_tokens", "message": "p", "tokens": PROMPT_IDS}]
            body["output_messages"] = [{"type": "raw_message_tokens", "message": "a", "tokens": sampled.ids}]
    return body


def response_events(asked: Json, sampled: Sampled) -> Iterator[bytes]:
    whole = response(asked, sampled)
    item = whole["output"][0]
    at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    events: list[Json] = [
        {"type": "response.created", "response": response(asked, sampled, "in_progress")},
        {"type": "response.in_progress", "response": response(asked, sampled, "in_progress")},
        {"type": "response.output_item.added", "output_index": 0, "item": item | {"status": "in_progress"}},
    ]
    if item["type"] == "message":
        events[-1]["item"]["content"] = []
        part = item["content"][0]
        events.append({"type": "response.content_part.added", **at, "part": part | {"text": "", "logprobs": []}})
        last = len(sampled.ids) - 1
        for place in range(len(sampled.ids)):
            delta: Json = {"type": "response.output_text.delta", **at, "delta": _piece(part["text"], place, last)}
            delta["logprobs"] = [_token(sampled, place)] if part["logprobs"] else []
            events.append(delta)
        # vLLM's streamed items have no logprobs of the whole.
        part["logprobs"] = None
        events.append({"type": "response.output_text.done", **at, "text": part["text"], "logprobs": []})
        events.append({"type": "response.content_part.done", **at, "part": part})
    else:
        done = {"item_id": item["id"], "output_index": 0, "name": item["name"]}
        for text in ('{"city":', '"Bern"}'):
            events.append({"type": "response.function_call_arguments.delta", **done, "delta": text})
        events.append({"type": "response.function_call_arguments.done", **done, "arguments": item["arguments"]})
    events.append({"type": "response.output_item.done", "output_index": 0, "item": item})
    events.append({"type": "response.completed", "response": whole})
    for number, event in enumerate(events):
        yield sse(event | {"sequence_number": number}, event["type"])


# messages


def message(asked: Json, sampled: Sampled) -> Json:
    tool = calls_tool(asked)
    block: Json = {"type": "text", "text": "answer 0"}
    if tool:
        block = {"type": "tool_use", "id": "toolu_1", "name": tool, "input": {"city": "Bern"}}
    body: Json = {"id": "msg_1", "type": "message", "role": "assistant", "model": "policy", "content": [block]}
    body |= {"stop_reason": "tool_use" if tool else "end_turn", "stop_sequence": None}
    return body | {"usage": {"input_tokens": len(PROMPT_IDS), "output_tokens": len(sampled.ids)}}


def message_events(asked: Json, sampled: Sampled) -> Iterator[bytes]:
    whole = message(asked, sampled)
    block = whole["content"][0]
    start = whole | {"content": [], "stop_reason": None, "usage": {"input_tokens": len(PROMPT_IDS), "output_tokens": 0}}
    deltas: list[Json]
    if block["type"] == "text":
        opened = {"type": "text", "text": ""}
        last = len(sampled.ids) - 1
        deltas = [{"type": "text_delta", "text": _piece(block["text"], at, last)} for at in range(len(sampled.ids))]
    else:
        opened = block | {"input": {}}
        deltas = [{"type": "input_json_delta", "partial_json": text} for text in ('{"city":', '"Bern"}')]
    events: list[Json] = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": opened},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": whole["stop_reason"], "stop_sequence": None},
            "usage": whole["usage"],
        },
        {"type": "message_stop"},
    ]
    for event in events:
        yield sse(event, event["type"])
