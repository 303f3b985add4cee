"""Chat completions by token ids, put together from what vLLM says; that vLLM does say it is in tests/vllm."""

from __future__ import annotations

from typing import Any

import pytest

from fulgurite.producers.gateway.token_route import (
    can_splice,
    chat_completion,
    derender_request,
    ends_turn,
    generate_request,
    is_plain,
    shortened,
)

END = 1
BODY: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "hello"}]}
WITH_TOOLS = BODY | {"tools": [{"type": "function", "function": {"name": "add"}}]}
RENDERED: dict[str, Any] = {
    "request_id": "chatcmpl-1",
    "token_ids": [3, 4, 5],
    "features": None,
    "sampling_params": {"max_tokens": 97, "logprobs": 0, "temperature": 1.0},
    "model": "policy",
    "reasoning_parser_kwargs": None,
    "stream": False,
}
VERSIONS = [{"version": "7", "start": 0, "end": 2}]


def generated(ids: list[int], **more: Any) -> dict[str, Any]:
    content = [{"token_id": one, "logprob": -0.5, "rank": 1, "top_logprobs": []} for one in ids]
    choice = {
        "index": 0,
        "token_ids": ids,
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "stop_reason": None,
        "weight_versions": VERSIONS,
    }
    return {
        "request_id": "g",
        "model": "policy",
        "created": 5,
        "usage": {"total_tokens": 9},
        "choices": [choice | more],
    }


def derendered(message: dict[str, Any], tokens: int) -> dict[str, Any]:
    content = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "a"}]}] * tokens
    return {"choices": [{"index": 0, "message": {"role": "assistant"} | message, "logprobs": {"content": content}}]}


@pytest.mark.parametrize("prompt", [[3, 4, 5], [3, 4, 5, 6, 7], [3], [3] * 200])
def test_an_answer_may_be_as_long_as_the_chat_routes_whatever_the_prompt(prompt: list[int]):
    """97 may be what is left of the context, which ends an answer anyway, or the server's cap."""
    asked = generate_request(BODY, RENDERED, prompt)
    assert asked["token_ids"] == prompt
    assert asked["sampling_params"]["max_tokens"] == 97
    assert asked["output_mode"] == "text"
    assert generate_request(BODY | {"max_tokens": 97}, RENDERED, prompt)["sampling_params"]["max_tokens"] == 97


@pytest.mark.parametrize("body", [BODY | {"max_tokens": 16}, BODY | {"max_completion_tokens": 16}, BODY])
def test_a_bound_that_vllm_leaves_out_is_its_default(body: dict[str, Any]):
    rendered = RENDERED | {"sampling_params": {"logprobs": 0}}
    assert generate_request(body, rendered, [3, 4, 5, 6])["sampling_params"]["max_tokens"] == 16
    assert "max_tokens" not in rendered["sampling_params"]


def test_no_seed_reaches_the_engine_and_logprobs_are_always_asked_for():
    rendered = RENDERED | {"sampling_params": {"max_tokens": 5, "seed": 3}}
    assert generate_request(BODY, rendered, [3, 4, 5])["sampling_params"] == {"max_tokens": 5, "logprobs": 0}


def test_what_a_parser_has_to_see_is_asked_for_as_tokens():
    assert is_plain(BODY, RENDERED)
    assert not is_plain(WITH_TOOLS, RENDERED)
    assert not is_plain(BODY, RENDERED | {"reasoning_parser_kwargs": {}})
    uncalled = WITH_TOOLS | {"tool_choice": "none"}
    assert is_plain(uncalled, RENDERED), "vLLM leaves out what is as by default: special tokens are skipped"
    assert not is_plain(uncalled, RENDERED | {"reasoning_parser_kwargs": {}})
    seeing = RENDERED | {"sampling_params": {"max_tokens": 97, "skip_special_tokens": False}}
    assert not is_plain(uncalled, seeing), "a parser looks for calls all the same"
    assert generate_request(WITH_TOOLS, RENDERED, [3])["output_mode"] == "tokens"
    assert can_splice(RENDERED)
    assert not can_splice(RENDERED | {"features": {"mm_hashes": {}}})


@pytest.mark.parametrize(
    ("choice", "ends"),
    [
        ({}, True),
        ({"finish_reason": "length"}, False),
        ({"finish_reason": "abort"}, False),
        ({"stop_reason": "e"}, False),
        ({"stop_reason": 9}, True),  # of the model's own generation config
        ({"stop_reason": 8}, False),
        ({"token_ids": []}, False),
    ],
)
def test_which_responses_close_with_the_end_of_a_turn(choice: dict[str, Any], ends: bool):
    (found,) = generated([5, END], **choice)["choices"]
    assert ends_turn(BODY | {"stop_token_ids": [8]}, found) is ends


def test_text_becomes_a_message_and_the_tokens_stay_beside_it():
    text = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "a"}]}] * 2}
    answer = chat_completion(BODY, RENDERED, [3, 4], generated([5, END], text="a", logprobs=text), None, {})
    (choice,) = answer["choices"]
    assert (answer["id"], answer["model"], answer["prompt_token_ids"]) == ("chatcmpl-1", "policy", [3, 4])
    assert choice["message"] == {"role": "assistant", "content": "a", "refusal": None}
    assert (choice["token_ids"], choice["weight_versions"]) == ([5, END], VERSIONS)
    assert [token["top_logprobs"] for token in choice["logprobs"]["content"]] == [[], []]


def test_a_fingerprint_is_the_servers():
    said = generated([END], text="") | {"system_fingerprint": "vllm-1"}
    assert chat_completion(BODY, RENDERED, [3], said, None, {})["system_fingerprint"] == "vllm-1"
    assert "system_fingerprint" not in chat_completion(BODY, RENDERED, [3], generated([END], text=""), None, {})


def test_the_end_of_a_turn_is_kept_from_the_parser_and_put_back_into_the_tokens():
    engine = generated([5, END])
    asked = derender_request(WITH_TOOLS | {"stream": False}, engine, [3, 4])
    assert asked
    (cut,) = asked["generate_response"]["choices"]
    assert (cut["token_ids"], len(cut["logprobs"]["content"])) == ([5], 1)
    assert (asked["prompt_token_ids"], asked["prompt_tokens"]) == ([3, 4], 2)
    assert asked["generate_response"]["prompt_token_ids"] == [3, 4], "there the parser looks whether reasoning began"
    assert asked["chat_request"] == WITH_TOOLS
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    parsed = derendered({"content": None, "tool_calls": calls}, 1)
    (choice,) = chat_completion(WITH_TOOLS, RENDERED, [3, 4], engine, parsed, {END: "<end>"})["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"] == calls
    assert choice["token_ids"] == [5, END]
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["a", "<end>"]


def test_a_response_of_nothing_but_the_end_is_not_derendered():
    engine = generated([END])
    assert derender_request(WITH_TOOLS, engine, [3]) is None
    (choice,) = chat_completion(WITH_TOOLS, RENDERED, [3], engine, None, {})["choices"]
    assert choice["message"]["content"] == ""
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == 1


@pytest.mark.parametrize(
    ("more", "stop_reason", "kept"),
    [
        ({"stop_token_ids": [6]}, 6, [5]),
        ({"stop_token_ids": [6], "include_stop_str_in_output": True}, 6, [5, 6]),
        ({"stop": ["o"]}, "o", [5, 6]),
    ],
)
def test_a_token_the_agent_asked_to_stop_at_is_not_of_its_text(more: dict[str, Any], stop_reason: Any, kept: list[int]):
    engine = generated([5, 6], stop_reason=stop_reason)
    asked = derender_request(WITH_TOOLS | more, engine, [3])
    assert asked
    assert asked["generate_response"]["choices"][0]["token_ids"] == kept
    parsed = derendered({"content": "a"}, len(kept))
    (choice,) = chat_completion(WITH_TOOLS | more, RENDERED, [3], engine, parsed, {6: "six"})["choices"]
    assert choice["token_ids"] == [5, 6]
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["a", "six" if len(kept) == 1 else "a"]


def test_a_named_tool_that_was_called_ends_an_answer_as_text_does():
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    parsed = derendered({"content": "", "tool_calls": calls}, 1)
    for choice, reason in (({"type": "function", "function": {"name": "add"}}, "stop"), ("required", "tool_calls")):
        body = WITH_TOOLS | {"tool_choice": choice}
        (answered,) = chat_completion(body, RENDERED, [3], generated([5, END]), parsed, {})["choices"]
        assert answered["finish_reason"] == reason


@pytest.mark.parametrize(("parallel", "names"), [(False, ["a"]), (True, ["a", "b"]), (None, ["a", "b"])])
def test_an_agent_that_wants_one_call_gets_the_first(parallel: bool | None, names: list[str]):
    """Derendering gives all, where no grammar held the answer to one."""
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")]
    parsed = derendered({"content": None, "tool_calls": calls}, 1)
    body = WITH_TOOLS | {"parallel_tool_calls": parallel}
    (choice,) = chat_completion(body, RENDERED, [3], generated([5, END]), parsed, {END: "<end>"})["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == names
    assert choice["finish_reason"] == "tool_calls"
    assert choice["token_ids"] == [5, END]
    left_out = shortened(body, parsed)
    assert left_out == ({0} if parallel is False else set()), "the next prompt is not to go on from what it did not get"


@pytest.mark.parametrize(("more", "content"), [({}, "a"), ({"min_tokens": 3}, "aXb")])
def test_before_min_tokens_no_stop_string_ends_an_answer(more: dict[str, Any], content: str):
    engine = generated([5, 6, 7, 8], stop_reason="X")
    body = WITH_TOOLS | {"stop": ["X"]} | more
    (choice,) = chat_completion(body, RENDERED, [3], engine, derendered({"content": "aXbX"}, 4), {})["choices"]
    assert choice["message"]["content"] == content


@pytest.mark.parametrize(("more", "content"), [({}, "any tw"), ({"include_stop_str_in_output": True}, "any two")])
def test_what_comes_after_a_stop_string_is_cut(more: dict[str, Any], content: str):
    engine = generated([5, 6], stop_reason="o")
    parsed = derendered({"content": "any two"}, 2)
    body = WITH_TOOLS | {"stop": ["o"]} | more
    (choice,) = chat_completion(body, RENDERED, [3], engine, parsed, {})["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == content
    thinking = derendered({"content": None, "reasoning": "any two"}, 2)
    (choice,) = chat_completion(body, RENDERED, [3], engine, thinking, {})["choices"]
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (None, content)
