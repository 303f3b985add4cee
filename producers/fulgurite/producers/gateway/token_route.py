"""A chat completion by token ids: what to ask of a vLLM whose routes for it are on, and the answer put together. Pure.

    agent's body ──► 1 render ──► ids, sampling parameters
                                   │ the prompt begins with the tokens of the turn before (continuation.py)
                     2 generate ◄──┘──► ids, logprobs, weight versions per token
                                   │
                     3 derender ◄──┘──► message, tool calls parsed        (only where a parser has to see it)

The chat route takes no token ids as a prompt and says no version; these routes take and say both, and cost as much as
the chat route with a question for the version before and after it. The answer has the shape of the chat route's, with
`prompt_token_ids`, and `token_ids` and `weight_versions` in every choice, so it is recorded and stripped like one.

Where this differs from the routes it uses (vLLM 0.32):
- Derendering where a parser is configured spells out special tokens and does not cut at stop strings. So it is given
  the response without the token that ends it, and what comes after a stop string is cut here.
- It leaves finish_reason "stop" beside tool calls, and refuses a response of no tokens.
- It gives all calls where parallel ones are switched off: the chat route gives the first.
- It tells a parser the prompt, which may have opened the reasoning, from the response alone.
- Rendering leaves out what is SamplingParams' own default, also a max_tokens of 16, which generation takes for none.
"""

from __future__ import annotations

from typing import Any, Final
from uuid import uuid4

from fulgurite.schemas.sampling import NEUTRAL_SAMPLING, is_neutral

RENDER: Final = "/v1/chat/completions/render"
GENERATE: Final = "/inference/v1/generate"
DERENDER: Final = "/v1/chat/completions/derender"
DETOKENIZE: Final = "/detokenize"

DEFAULT_MAX_TOKENS: Final = 16
"""Of vLLM's SamplingParams: RENDER means it where it says none."""

_HONOURED: Final = """
model messages documents chat_template chat_template_kwargs add_special_tokens media_io_kwargs mm_processor_kwargs
truncate_prompt_tokens truncation_side tools tool_choice parallel_tool_calls reasoning_effort include_reasoning
temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed n
logit_bias bad_words allowed_token_ids min_tokens structured_outputs response_format thinking_token_budget watermarking
vllm_xargs repetition_detection length_penalty
max_tokens max_completion_tokens stop stop_token_ids ignore_eos include_stop_str_in_output
skip_special_tokens spaces_between_special_tokens
stream stream_options logprobs top_logprobs logprob_token_ids return_token_ids return_weight_versions
request_id session_id priority cache_salt
user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction verbosity
modalities
"""
HONOURED: Final = frozenset(_HONOURED.split())
"""Fields of a chat completion that come to the same on these routes, or that vLLM passes over on any. With others
(prompt logprobs, an echo, the prompt's text, tokens written as ids, …) what the agent asked for would be missing."""

_EMPTY_MESSAGE: Final = {"role": "assistant", "content": "", "refusal": None}


def can_answer(body: dict[str, Any]) -> bool:
    """Whether these routes give all that is asked."""
    if any(_asks(value) for name, value in body.items() if name not in HONOURED):
        return False
    options = body.get("stream_options")
    return not isinstance(options, dict) or not any(
        _asks(value) for name, value in options.items() if name != "include_usage"
    )


def unstreamed(body: dict[str, Any]) -> dict[str, Any]:
    """The same question, for an answer that comes whole."""
    return {name: value for name, value in body.items() if name not in ("stream", "stream_options")}


def _asks(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def after_answer(one: list[int], other: list[int]) -> list[int]:
    """The tokens that follow an answer: those in which two conversations end alike that differ in their last answer."""
    alike = 0
    while alike < min(len(one), len(other)) and one[-1 - alike] == other[-1 - alike]:
        alike += 1
    return one[len(one) - alike :]


def with_request_id(rendered: dict[str, Any]) -> dict[str, Any]:
    """Which becomes the answer's: one of ours where the server gave none."""
    found = rendered.get("request_id")
    return rendered if found and isinstance(found, str) else rendered | {"request_id": f"chatcmpl-{uuid4().hex}"}


def can_splice(rendered: dict[str, Any]) -> bool:
    """Whether the prompt is text alone: positions of images stand beside the ids."""
    return not rendered.get("features") and not rendered.get("content_parts")


def generate_request(body: dict[str, Any], rendered: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
    """For GENERATE: what was rendered of the agent's body, on the prompt's own tokens."""
    sampling = dict(rendered["sampling_params"])
    sampling.pop("seed", None)
    # As many as the chat route would give: it may be the server's own cap, and the end of the context ends an answer
    # anyway. Always said: without it vLLM refuses min_tokens above its default, and older ones stop there.
    sampling.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    if sampling.get("logprobs") is None:
        sampling["logprobs"] = 0
    mode = "text" if is_plain(body, rendered) else "tokens"
    return rendered | {"token_ids": prompt, "sampling_params": sampling, "output_mode": mode}


def is_plain(body: dict[str, Any], rendered: dict[str, Any]) -> bool:
    """Whether the text is the message: no tools to parse calls of, no parser of reasoning. With tools that must not be
    called only where no parser wants to see special tokens, as those do that look for calls all the same."""
    if rendered.get("reasoning_parser_kwargs") is not None:
        return False
    if not body.get("tools"):
        return True
    # What is as by default vLLM leaves out.
    return body.get("tool_choice") == "none" and rendered["sampling_params"].get("skip_special_tokens", True) is True


def has_texts(generated: dict[str, Any]) -> bool:
    """Whether GENERATE gave them, as `output_mode` asks: a vLLM that does not know the field passes over it."""
    return all("text" in choice for choice in generated["choices"])


def is_held_to_grammar(rendered: dict[str, Any]) -> bool:
    """Whether GENERATE is asked to: for a format, for a tool that is strict or must be called, or for every tool where
    the server is set so (vLLM's --tool-strict-level)."""
    return bool(rendered["sampling_params"].get("structured_outputs"))


def shaping(rendered: dict[str, Any]) -> dict[str, float]:
    """Of the parameters that GENERATE really samples with, those under which it is not the policy that is sampled from:
    of the request, or defaults of the server. What is neutral by default vLLM leaves out."""
    given = rendered["sampling_params"]
    found = {name: given.get(name) for name in NEUTRAL_SAMPLING}
    return {
        name: value for name, value in found.items() if isinstance(value, int | float) and not is_neutral(name, value)
    }


def ends_turn(body: dict[str, Any], choice: dict[str, Any]) -> bool:
    """Whether the response closes with the policy's own end of a turn, not with what the agent asked to stop at."""
    reason = choice.get("stop_reason")
    if choice.get("finish_reason") != "stop" or not choice.get("token_ids"):
        return False
    return reason is None or (isinstance(reason, int) and reason not in (body.get("stop_token_ids") or ()))


def shortened(body: dict[str, Any], derendered: dict[str, Any] | None) -> frozenset[int]:
    """Choices of which the agent does not get every call that was sampled."""
    if derendered is None or body.get("parallel_tool_calls") is not False:
        return frozenset()
    return frozenset(
        choice["index"] for choice in derendered["choices"] if len(choice["message"].get("tool_calls") or ()) > 1
    )


def stops_at_token(body: dict[str, Any], choice: dict[str, Any]) -> bool:
    """Whether the response closes with a token that the agent asked to stop at, which is not of its text."""
    if choice.get("finish_reason") != "stop" or not choice.get("token_ids") or body.get("include_stop_str_in_output"):
        return False
    return isinstance(choice.get("stop_reason"), int) and not ends_turn(body, choice)


def derender_request(body: dict[str, Any], generated: dict[str, Any], prompt: list[int]) -> dict[str, Any] | None:
    """For DERENDER; None where there is nothing to derender."""
    choices: list[dict[str, Any]] = []
    for choice in generated["choices"]:
        ids = choice["token_ids"] or []
        kept = len(ids) - (ends_turn(body, choice) or stops_at_token(body, choice))
        if kept:
            logprobs = (choice.get("logprobs") or {}).get("content")
            cut = {"content": logprobs[:kept]} if logprobs else None
            choices.append(choice | {"token_ids": ids[:kept], "logprobs": cut})
    if not choices:
        return None
    return {
        "model": generated.get("model"),
        "generate_response": generated | {"choices": choices, "prompt_token_ids": prompt},
        "prompt_token_ids": prompt,
        "prompt_tokens": len(prompt),
        "chat_request": unstreamed(body),
    }


def spelled_out(choice: dict[str, Any], text: str) -> dict[str, Any]:
    """A choice as DERENDER would give it, of which the text is the message."""
    message = _EMPTY_MESSAGE | {"content": text}
    return {"index": choice["index"], "message": message, "logprobs": choice.get("logprobs")}


def chat_completion(
    body: dict[str, Any],
    rendered: dict[str, Any],
    prompt: list[int],
    generated: dict[str, Any],
    derendered: dict[str, Any] | None,
    end_texts: dict[int, str],
) -> dict[str, Any]:
    """The answer in the chat route's shape. `derendered` is None in text mode, or where nothing was to be derendered;
    `end_texts` says how tokens that end a turn are written, as far as that is known."""
    messages = {choice["index"]: choice for choice in derendered["choices"]} if derendered else {}
    choices = [
        _text_choice(body, choice)
        if "text" in choice
        else _parsed_choice(body, choice, messages.get(choice["index"]), end_texts)
        for choice in generated["choices"]
    ]
    return {
        "id": rendered["request_id"],
        "object": "chat.completion",
        "created": generated.get("created") or 0,
        "model": generated.get("model") or rendered.get("model") or "",
        "choices": choices,
        "usage": generated.get("usage"),
        "prompt_token_ids": prompt,
    } | _fingerprint(generated)


def streamed_request(request: dict[str, Any]) -> dict[str, Any]:
    """The same for GENERATE, as a stream that ends with its count of tokens."""
    return request | {"stream": True, "stream_options": {"include_usage": True}}


def chat_chunk(
    body: dict[str, Any], rendered: dict[str, Any], generated: dict[str, Any], begun: set[int], created: int
) -> dict[str, Any]:
    """An event of GENERATE's stream in the shape of the chat route's. `begun`: the choices that have had one; this one
    is added."""
    choices: list[dict[str, Any]] = []
    for choice in generated["choices"]:
        delta = {} if choice["index"] in begun else {"role": "assistant"}
        if choice["text"] or delta:
            delta["content"] = choice["text"]
        begun.add(choice["index"])
        kept = ("index", "finish_reason", "stop_reason", "token_ids", "weight_versions")
        choices.append(
            {name: choice.get(name) for name in kept} | {"delta": delta, "logprobs": _logprobs(body, choice)}
        )
    chunk = {
        "id": rendered["request_id"],
        "object": "chat.completion.chunk",
        "created": created,
        "model": rendered.get("model") or "",
        "choices": choices,
    }
    chunk |= _fingerprint(generated)
    return chunk | {name: generated[name] for name in ("prompt_token_ids", "usage") if generated.get(name)}


def _fingerprint(generated: dict[str, Any]) -> dict[str, Any]:
    """Where a server says it: vLLM 0.32 does so on the chat route alone."""
    found = generated.get("system_fingerprint")
    return {} if found is None else {"system_fingerprint": found}


def _logprobs(body: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any] | None:
    logprobs = choice.get("logprobs")
    if logprobs and not body.get("top_logprobs"):
        return {"content": [token | {"top_logprobs": []} for token in logprobs["content"] or ()]}
    return logprobs


def _text_choice(body: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    return _choice(choice, _EMPTY_MESSAGE | {"content": choice["text"]}, _logprobs(body, choice))


def _parsed_choice(
    body: dict[str, Any], choice: dict[str, Any], parsed: dict[str, Any] | None, end_texts: dict[int, str]
) -> dict[str, Any]:
    message = dict(parsed["message"]) if parsed else dict(_EMPTY_MESSAGE)
    stop = choice.get("stop_reason")
    if isinstance(stop, str) and not body.get("include_stop_str_in_output"):
        for name in ("content", "reasoning", "reasoning_content"):
            if isinstance(text := message.get(name), str):
                # The first one ends an answer, but before min_tokens none does.
                at = text.rfind(stop) if body.get("min_tokens") else text.find(stop)
                message[name] = text[:at] if at >= 0 else text
    if (calls := message.get("tool_calls")) and body.get("parallel_tool_calls") is False:
        message["tool_calls"] = calls[:1]
    written = ((parsed.get("logprobs") or {}).get("content") or []) if parsed else []
    if not body.get("top_logprobs"):
        written = [token | {"top_logprobs": []} for token in written]
    sampled = (choice.get("logprobs") or {}).get("content") or []
    for token in sampled[len(written) :]:  # what was kept from the parser
        text = end_texts.get(token["token_id"], "")
        entry = {"token": text, "logprob": token["logprob"], "bytes": list(text.encode()), "top_logprobs": []}
        written.append(entry)
    finished = _choice(choice, message, {"content": written})
    named = isinstance(body.get("tool_choice"), dict)  # then vLLM leaves it, as OpenAI does
    if message.get("tool_calls") and finished["finish_reason"] == "stop" and not named:
        finished["finish_reason"] = "tool_calls"
    return finished


def _choice(choice: dict[str, Any], message: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "index": choice["index"],
        "message": message,
        "logprobs": logprobs,
        "finish_reason": choice.get("finish_reason"),
        "stop_reason": choice.get("stop_reason"),
        "token_ids": choice["token_ids"],
        "weight_versions": choice.get("weight_versions"),
    }
