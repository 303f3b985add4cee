"""The gateway over HTTP against a fake policy server, with a publisher whose acknowledgements the test decides."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest
from starlette.responses import JSONResponse, Response

from fulgurite.producers.gateway.attributes import MAX_VALUE_CHARS
from fulgurite.producers.gateway.health import HEALTH_SHARED_SECONDS
from fulgurite.schemas.errors import Undelivered
from fulgurite.schemas.event import VersionSpan
from tests.producers.fake_policy_server import FakePolicyServer, until
from tests.producers.gateway_support import MESSAGES, FakePublisher, ask, client, gateway


async def test_the_span_is_what_the_backend_sampled():
    publisher = FakePublisher()
    async with FakePolicyServer(weights=7, label="17") as backend, gateway(publisher, backend.url) as url:
        answer = await ask(url, temperature=0.5, max_tokens=9, seed=3, extra_headers={"x-agent": "planner"})
    assert answer.choices[0].message.content == "answer 0"
    (span,) = publisher.spans
    assert (span.rollout_id, span.attempt_id, span.agent, span.status) == ("r1", "a1", "planner", "ok")
    assert (span.kind, span.operation, span.name, span.resource) == ("client", "chat", "chat policy", "policy")
    assert span.prompt_token_ids == [1, 2, 3, 4]
    assert span.response_token_ids == [7, 7, 7]
    assert span.logprobs == [-0.125, -0.25, -0.375]
    assert span.weight_versions == [VersionSpan(version=17, start=0, end=3)]
    assert (span.finish_reason, span.input_tokens, span.output_tokens) == ("stop", 4, 3)
    assert span.input == '[{"role":"user","content":"2+2?"}]'
    assert span.output == '{"role":"assistant","content":"answer 0"}'
    assert span.attributes["gen_ai.request.temperature"] == 0.5
    assert span.attributes["gen_ai.request.max_tokens"] == 9
    assert span.end_ns >= span.start_ns > 0
    assert "secret-key" not in span.model_dump_json()
    assert "seed" not in backend.requests[0]
    assert backend.log.count("/weight_info") <= 2, "by a health check, and by the first call: it gives versions"


async def test_the_agent_gets_only_what_it_asked_for():
    async with FakePolicyServer(weights=7, label="1") as backend, gateway(FakePublisher(), backend.url) as url:
        plain = (await ask(url)).model_dump()
        asked = await ask(url, logprobs=True, extra_body={"return_token_ids": True, "return_weight_versions": True})
    assert "prompt_token_ids" not in plain
    assert not {"token_ids", "weight_versions"} & plain["choices"][0].keys()
    assert plain["choices"][0]["logprobs"] is None
    full = asked.model_dump()
    assert full["prompt_token_ids"] == [1, 2, 3, 4]
    assert full["choices"][0]["token_ids"] == [7, 7, 7]
    assert full["choices"][0]["logprobs"]["content"][2]["logprob"] == -0.375


async def test_what_shapes_the_sampled_distribution_is_recorded():
    publisher = FakePublisher()
    asked = {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2}
    extra = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1}
    extra |= {"stop_token_ids": [5], "ignore_eos": True, "length_penalty": 2.0, "reasoning_effort": "low"}
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        await ask(url, **asked, extra_body=extra)
        await ask(url)
    given, plain = (span.attributes for span in publisher.spans)
    assert {name: given[f"gen_ai.request.{name}"] for name in asked | extra} == asked | extra
    assert not [name for name in plain if name.startswith("gen_ai.request.")]


async def test_what_else_a_request_sets_is_recorded_with_its_value():
    publisher = FakePublisher()
    said: dict[str, Any] = {"top_logprobs": 2, "min_tokens": 3, "tool_choice": "auto"}
    written: dict[str, Any] = {"logit_bias": {"5": 3}, "bad_words": ["x"], "response_format": {"type": "json_object"}}
    long = {"allowed_token_ids": list(range(100_000))}
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        await ask(url, extra_body=said | written | long, logprobs=True)
    given = publisher.spans[0].attributes
    assert {name: given[f"gen_ai.request.{name}"] for name in said} == said
    assert {name: json.loads(given[f"gen_ai.request.{name}"]) for name in written} == written
    assert given["gen_ai.request.allowed_token_ids"].startswith("[0,1,2,")
    assert len(given["gen_ai.request.allowed_token_ids"]) == MAX_VALUE_CHARS
    assert given["fulgurite.request.constraints"] == ["min_tokens", *written, *long]


async def test_a_clients_retry_after_a_lost_acknowledgement_is_recorded_as_one():
    publisher = FakePublisher(acknowledges=False)
    async with (
        FakePolicyServer(label="1") as backend,
        gateway(publisher, backend.url, publish_seconds=1.0) as url,
        client(url).with_options(max_retries=1) as agent,
    ):
        asking = asyncio.create_task(agent.chat.completions.create(model="policy", messages=MESSAGES))
        await until(lambda: len(publisher.waiting) == 2)
        publisher.acknowledge()
        await asking
        asking = asyncio.create_task(agent.chat.completions.create(model="policy", messages=MESSAGES, max_tokens=7))
        await until(lambda: len(publisher.spans) == 3)
        publisher.acknowledge()
        await asking
    assert [span.attributes.get("fulgurite.retry_count") for span in publisher.spans] == [None, 1, None]
    first, again, other = (span.attributes["fulgurite.request_digest"] for span in publisher.spans)
    assert first == again != other


async def test_a_choice_is_a_span():
    publisher = FakePublisher()
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        answer = await ask(url, n=3)
    assert len(answer.choices) == 3
    assert [span.attributes["fulgurite.choice"] for span in publisher.spans] == [0, 1, 2]
    assert len({span.span_id for span in publisher.spans}) == 3
    assert len({span.sequence_id for span in publisher.spans}) == 3
    assert [span.output[-10:-2] for span in publisher.spans] == ["answer 0", "answer 1", "answer 2"]


async def test_the_answer_waits_for_the_acknowledgement():
    publisher = FakePublisher(acknowledges=False)
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        asking = asyncio.create_task(ask(url))
        await until(lambda: publisher.waiting)
        await asyncio.sleep(0.1)
        assert not asking.done(), "answered before the broker had the span"
        publisher.acknowledge()
        assert (await asking).choices[0].message.content == "answer 0"


async def test_an_answer_goes_out_unrecorded_only_where_a_setting_says_so():
    publisher = FakePublisher(acknowledges=False)
    settings = {"publish_seconds": 0.2, "answer_unrecorded": True}
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url, **settings) as url:
        assert (await ask(url)).choices[0].message.content == "answer 0"
        publisher.full = True
        assert (await ask(url)).choices[0].message.content == "answer 0"


@pytest.mark.parametrize("trouble", ["silent", "full", "refused"])
async def test_without_an_acknowledgement_there_is_no_answer(trouble: str):
    publisher = FakePublisher(acknowledges=False)
    publisher.full = trouble == "full"
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url, publish_seconds=0.3) as url:
        asking = asyncio.create_task(ask(url))
        if trouble == "refused":
            await until(lambda: publisher.waiting)
            publisher.waiting[0].set_exception(Undelivered(1, None))
        with pytest.raises(openai.InternalServerError) as failure:
            await asking
    assert failure.value.status_code == 503
    assert failure.value.code == "broker_unavailable"
    assert failure.value.response.headers["retry-after"] == "1"


async def test_a_backend_that_restarts_during_a_call_is_asked_again():
    publisher = FakePublisher()
    async with FakePolicyServer(label="1", delay_seconds=1) as backend, gateway(publisher, backend.url) as url:
        asking = asyncio.create_task(ask(url))
        await until(lambda: backend.requests)
        await backend.stop()
        await asyncio.sleep(0.2)  # connections are refused meanwhile
        backend.delay_seconds = 0
        await backend.restart(label="2", weights=9)
        await asking
    (span,) = publisher.spans
    assert span.response_token_ids == [9, 9, 9], "only what the answer holds is recorded"
    assert span.weight_versions[0].version == 2
    assert span.attributes["fulgurite.backend_tries"] > 1


async def test_a_swap_is_waited_for():
    answers = iter([Response(status_code=503), Response(status_code=502), None])
    async with FakePolicyServer(label="1") as backend, gateway(FakePublisher(), backend.url) as url:
        backend.faults["/v1/chat/completions"] = lambda: next(answers)
        assert (await ask(url)).choices[0].message.content == "answer 0"


async def test_a_backend_that_stays_away_is_a_503_and_an_error_span():
    publisher = FakePublisher()
    async with gateway(publisher, "http://127.0.0.1:1", backend_seconds=0.3) as url:
        with pytest.raises(openai.InternalServerError) as failure:
            await ask(url)
    assert (failure.value.status_code, failure.value.code) == (503, "backend_unavailable")
    (span,) = publisher.spans
    assert (span.status, span.response_token_ids) == ("error", [])
    assert span.attributes["error.type"] == "backend_unavailable"


async def test_a_backend_that_takes_too_long_is_a_504():
    publisher = FakePublisher()
    async with (
        FakePolicyServer(delay_seconds=2) as backend,
        gateway(publisher, backend.url, backend_seconds=0.3, answer_seconds=0.3) as url,
    ):
        with pytest.raises(openai.InternalServerError) as failure:
            await ask(url)
    assert (failure.value.status_code, failure.value.code) == (504, "backend_timeout")
    assert publisher.spans[0].status == "error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "context too long", "param": "messages"}}, "context too long"),
        ({"object": "error", "message": "older vLLM", "code": 400}, "older vLLM"),
        ({"detail": "fastapi"}, "fastapi"),
    ],
)
async def test_a_backends_refusal_is_passed_on_and_recorded(body: dict[str, Any], message: str):
    publisher = FakePublisher()
    async with FakePolicyServer() as backend, gateway(publisher, backend.url) as url:
        backend.faults["/v1/chat/completions"] = lambda: JSONResponse(body, status_code=400)
        with pytest.raises(openai.BadRequestError, match=message):
            await ask(url)
    (span,) = publisher.spans
    assert (span.status, span.status_message) == ("error", message)
    assert span.input, "what was asked stays readable"


def _without_ids(body: dict[str, Any]) -> Any:
    body["choices"][0].pop("token_ids")
    return body


def _one_logprob_short(body: dict[str, Any]) -> Any:
    body["choices"][0]["logprobs"] = {"content": body["choices"][0]["logprobs"]["content"][:-1]}
    return body


def _not_finite(body: dict[str, Any]) -> Any:
    body["choices"][0]["logprobs"]["content"][1]["logprob"] = float("nan")
    return body


def _gap_in_versions(body: dict[str, Any]) -> Any:
    body["choices"][0]["weight_versions"] = [{"version": "1", "start": 1, "end": 3}]
    return body


@pytest.mark.parametrize(
    ("mend", "reason"),
    [
        (_without_ids, "no_token_ids"),
        (_one_logprob_short, "wrong_length"),
        (_not_finite, "bad_field"),
        (_gap_in_versions, "bad_field"),
    ],
)
async def test_what_cannot_be_recorded_is_a_dead_letter_and_the_agent_is_answered(mend: Any, reason: str):
    publisher = FakePublisher()
    async with FakePolicyServer(label="1", mend=mend) as backend, gateway(publisher, backend.url) as url:
        assert (await ask(url)).choices[0].message.content == "answer 0"
    (span,) = publisher.spans
    assert (span.status, span.response_token_ids, span.logprobs) == ("error", [], [])
    (dead,) = publisher.dead
    assert (dead.stage, dead.reason, dead.key) == ("gateway", reason, b"r1")
    assert dead.value
    assert b"answer 0" in dead.value


@pytest.mark.parametrize("body", [[], {"choices": []}, {"choices": [3]}, "no"])
async def test_an_answer_that_is_none_is_a_502_and_a_dead_letter(body: Any):
    publisher = FakePublisher()
    async with FakePolicyServer(mend=lambda _: body) as backend, gateway(publisher, backend.url) as url:
        with pytest.raises(openai.InternalServerError) as failure:
            await ask(url)
    assert failure.value.status_code == 502
    assert publisher.spans[0].status == "error"
    assert publisher.dead[0].reason == "backend_invalid"


async def test_a_span_over_the_record_bound_is_a_dead_letter():
    publisher = FakePublisher(max_bytes=2_000)
    async with FakePolicyServer(label="1", reply_tokens=1_000) as backend, gateway(publisher, backend.url) as url:
        assert (await ask(url)).choices[0].message.content == "answer 0"
    assert [(span.status, span.input) for span in publisher.spans] == [("error", "")]
    assert publisher.dead[0].reason == "too_large"


@pytest.mark.parametrize(
    ("before", "after", "versions", "labels"),
    [
        ("5", "5", [VersionSpan(version=5, start=0, end=3)], None),
        ("5", "6", [], ["5", "6"]),
        ("default", "default", [], ["default", "default"]),
    ],
)
async def test_without_versions_from_the_backend_the_call_is_bounded_from_outside(
    before: str, after: str, versions: list[VersionSpan], labels: list[str] | None
):
    publisher = FakePublisher()
    async with FakePolicyServer(label=before, gives_versions=False) as backend, gateway(publisher, backend.url) as url:

        def swap() -> None:
            backend.label = after

        backend.faults["/v1/chat/completions"] = swap
        await ask(url)
    (span,) = publisher.spans
    assert span.weight_versions == versions
    assert span.attributes.get("fulgurite.weight_version_labels") == labels
    assert span.response_token_ids, "tokens are recorded with or without their version"


async def test_an_agent_that_hangs_up_ends_the_generation():
    publisher = FakePublisher()
    async with FakePolicyServer(delay_seconds=3) as backend, gateway(publisher, backend.url) as url:
        asking = asyncio.create_task(ask(url))
        await until(lambda: backend.requests)
        asking.cancel()
        await until(lambda: publisher.spans)
    (span,) = publisher.spans
    assert (span.status, span.attributes["error.type"]) == ("error", "client_disconnected")


async def test_too_many_at_once_are_refused_and_not_recorded():
    publisher = FakePublisher()
    async with (
        FakePolicyServer(delay_seconds=1) as backend,
        gateway(publisher, backend.url, max_concurrent_requests=1, max_queued_requests=0) as url,
    ):
        first = asyncio.create_task(ask(url))
        await until(lambda: backend.requests)
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(url)
        await first
    assert refused.value.response.headers["retry-after"] == "1"
    assert len(publisher.spans) == 1


async def test_a_body_over_the_bound_is_a_413():
    publisher = FakePublisher()
    big: Any = [{"role": "user", "content": "x" * 5_000_000}]
    async with (
        FakePolicyServer() as backend,
        gateway(publisher, backend.url, max_body_bytes=100_000) as url,
        client(url) as agent,
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            await agent.chat.completions.create(model="policy", messages=big)
    assert (refused.value.status_code, refused.value.code) == (413, "body_too_large")
    assert not publisher.spans


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/rollout/-r/attempt/a1/v1/chat/completions", 422),
        ("/rollout/r1/v1/chat/completions", 404),
        ("/rollout/r1/attempt/a1/v1/embeddings", 404),
    ],
)
async def test_wrong_routes_and_ids_are_refused_in_openais_shape(path: str, status: int):
    async with (
        FakePolicyServer() as backend,
        gateway(FakePublisher(), backend.url) as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}{path}", json={"messages": [1]}) as response,
    ):
        error = (await response.json())["error"]
    assert response.status == status
    assert error.keys() == {"message", "type", "param", "code"}


async def test_models_and_health():
    async def away() -> str:
        return "KafkaConnectionError"

    async with FakePolicyServer() as backend, gateway(FakePublisher(), backend.url) as url:
        async with client(url) as agent:
            assert [model.id async for model in agent.models.list()] == ["policy"]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/health") as response:
                assert (response.status, (await response.json())["status"]) == (200, "ok")
            backend.faults["/health"] = lambda: Response(status_code=503)
            await asyncio.sleep(HEALTH_SHARED_SECONDS)
            async with session.get(f"{url}/health") as response:
                assert response.status == 503
                assert await response.json() == {"status": "unhealthy", "broker": "ok", "backend": "status 503"}
            async with (
                gateway(FakePublisher(), backend.url, broker=away) as other,
                session.get(f"{other}/health") as response,
            ):
                assert (await response.json())["broker"] == "KafkaConnectionError"
