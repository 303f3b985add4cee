"""Which fields of a request leave the sampled distribution as the policy's, and which do not."""

from __future__ import annotations

from typing import Any

import pytest

from fulgurite.schemas.sampling import MAX_NAME_CHARS, MAX_NAMES, constraints, off_policy

STRICT: Any = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}}
LOOSE: Any = {"type": "function", "function": {"name": "f", "strict": False, "parameters": {}}}


@pytest.mark.parametrize(
    ("request_fields", "names"),
    [
        ({"tools": [LOOSE, STRICT]}, ["tools"]),
        ({"tools": [{"type": "function", "name": "f", "strict": True}], "tool_choice": "auto"}, ["tools"]),
        ({"tools": [STRICT], "tool_choice": "none"}, []),
        ({"tools": [LOOSE], "tool_choice": "auto"}, []),
        ({"tools": "no list"}, []),
        ({"tools": [LOOSE], "parallel_tool_calls": False}, ["parallel_tool_calls"]),
        ({"tools": [LOOSE], "parallel_tool_calls": True}, []),
        ({"tools": [LOOSE], "tool_choice": "none", "parallel_tool_calls": False}, []),
        ({"tools": [], "parallel_tool_calls": False}, []),
        ({"use_beam_search": True, "length_penalty": 2.0}, ["use_beam_search"]),
        ({"use_beam_search": False, "watermarking": False, "vllm_xargs": {}, "bad_words": []}, []),
        ({"watermarking": True}, ["watermarking"]),
        ({"thinking_token_budget": 0}, ["thinking_token_budget"]),
        ({"thinking_token_budget": -1, "min_tokens": 0, "best_of": 1}, []),
        ({"vllm_xargs": {"my_processor": 1}}, ["vllm_xargs"]),
        ({"best_of": 4, "n": 1}, ["best_of"]),
        ({"a_way_of_sampling_yet_to_come": 0.5}, ["a_way_of_sampling_yet_to_come"]),
        ({"text": {"format": {"type": "json_schema"}}}, ["text"]),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, []),
        ({"output_config": {"effort": "low"}}, []),
        ({"ignore_eos": True, "stop_token_ids": [5], "reasoning_effort": "low", "repetition_detection": {"n": 1}}, []),
        ({"temperature": 0.5, "seed": 3, "logprobs": 0}, []),
    ],
)
def test_what_may_forbid_or_shift_tokens_is_named(request_fields: dict[str, Any], names: list[str]) -> None:
    assert constraints({"model": "m", "messages": []} | request_fields) == names


def test_names_are_bounded() -> None:
    names = constraints({f"{number:0100}": 1 for number in range(100)})
    assert len(names) == MAX_NAMES
    assert {len(name) for name in names} == {MAX_NAME_CHARS}


def test_what_a_client_takes_beside_the_fields_of_a_request_is_no_fault() -> None:
    free = {"timeout": 5, "extra_headers": {"x": "y"}, "extra_query": {"a": "b"}, "extra_body": {"ignore_eos": True}}
    assert list(off_policy(free)) == []
    (fault,) = off_policy({"extra_body": {"use_beam_search": True}})
    assert fault.startswith("use_beam_search = True forbids or shifts tokens")
