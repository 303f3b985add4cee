"""What all generating routes have in common on the wire: errors as OpenAI writes them, sampling parameters, spans.

Promises: a request becomes Generations or a BadRequest that names the field; parameters that would change what is
sampled and are not supported are refused, all others are ignored. Knows nothing of HTTP or of the engine's state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson

from fulgurite.streams.policy_server.engine import MAX_ROWS, Generation
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.text import GeneratedText

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
_MAX_TEMPERATURE = 100.0
_MIN_TEMPERATURE = 1e-5
"""Below it is greedy: nothing else could be sampled, and dividing by less leaves the range of fp32."""
_MAX_SEED = 2**63 - 1

Json = dict[str, Any]

# Parameters with one value that means "as usual": any other would need sampling that this server does not do.
_ONLY: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "stop_token_ids": ([],),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    "prompt_logprobs": (None,),
    "top_logprobs": (0,),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (None,),
    "continue_final_message": (False,),
    "chat_template": (None,),
    "chat_template_kwargs": ({},),
}


class BadRequest(Exception):
    """Answered with 400. `param` names the field, `code` is a constant that clients compare with."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Json:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse_json(body: bytes) -> Json:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def check_model(body: Json, served_model_name: str) -> None:
    model = body.get("model")
    if model is not None and model != served_model_name:
        raise BadRequest(f"there is no model {model!r}; served is {served_model_name!r}", "model", "model_not_found")


@dataclass(frozen=True)
class Sampling:
    n: int
    max_tokens: int | None
    temperature: float
    seed: int | None
    stop: tuple[str, ...]

    def most(self, prompt: list[int], policy: Policy, max_new_tokens: int) -> int:
        """Tokens of an answer: as asked, within the setting and the context."""
        return min(self.max_tokens or max_new_tokens, max_new_tokens, policy.max_positions - len(prompt))

    def generations(self, prompt: list[int], policy: Policy, max_new_tokens: int, text: bool) -> list[Generation]:
        """One for each of n. `text` is what the answer shows; stop strings need it in any case."""
        with_text = text or bool(self.stop)
        return [
            Generation(
                prompt=prompt,
                max_tokens=self.most(prompt, policy, max_new_tokens),
                temperature=self.temperature,
                seed=None if self.seed is None else self.seed + index,
                text=GeneratedText(policy.tokenizer.backend_tokenizer, prompt, self.stop) if with_text else None,
            )
            for index in range(self.n)
        ]


def parse_sampling(params: Json, max_tokens: int | None) -> Sampling:
    """`max_tokens` is what the route's own names and defaults make of the request. Raises BadRequest."""
    for name, allowed in _ONLY.items():
        value = params.get(name)
        if value is not None and value not in allowed:
            raise BadRequest(f"{name} = {value!r} is not supported here, only {allowed[0]!r}", name)
    return Sampling(
        n=integer(params, "n", 1, MAX_ROWS) or 1,
        max_tokens=max_tokens,
        temperature=_temperature(params),
        seed=integer(params, "seed", -_MAX_SEED, _MAX_SEED),
        stop=_stop(params),
    )


def parse_usage_asked(body: Json) -> bool:
    """Whether a stream ends with the usage."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", "stream_options")
    return flag(options, "include_usage", False)


def flag(body: Json, name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", name)
    return value


def integer(body: Json, name: str, least: int, most: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise BadRequest(f"{name} must be an integer {allowed}", name)
    return value


def only_sampled_logprob(params: Json) -> bool:
    """`logprobs` where it is the number of alternatives: whether the sampled token's own is asked for."""
    return integer(params, "logprobs", 0, 0) is not None


def _temperature(body: Json) -> float:
    value = body.get("temperature")
    if value is None:
        return 1.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MAX_TEMPERATURE:
        raise BadRequest(f"temperature must be a number from 0 to {_MAX_TEMPERATURE:g}", "temperature")
    return float(value) if value >= _MIN_TEMPERATURE else 0.0


def _stop(body: Json) -> tuple[str, ...]:
    value = body.get("stop")
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or len(strings) > MAX_STOP_STRINGS:
        raise BadRequest(f"stop must be a text or a list of at most {MAX_STOP_STRINGS}", "stop")
    found = [one for one in strings if isinstance(one, str) and 1 <= len(one) <= MAX_STOP_CHARS]
    if len(found) != len(strings):
        raise BadRequest(f"a stop string has 1 to {MAX_STOP_CHARS} characters", "stop")
    return tuple(found)


def version_spans(generation: Generation) -> list[Json]:
    """[{"version": "17", "start": 0, "end": 12}, …]: half-open, without gaps, in order."""
    starts = [start for _, start in generation.versions] + [len(generation.tokens)]
    return [
        {"version": version, "start": start, "end": end}
        for (version, start), end in zip(generation.versions, starts[1:], strict=True)
    ]
