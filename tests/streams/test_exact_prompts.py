"""A conversation through the gateway, with the embedded server's own tokenizer and a policy that samples at random: its
texts are almost never tokenised again as they were sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from fulgurite.schemas.codec import encode
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.rollouts import RolloutFinished
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.assembler.join import Announcement, assemble
from tests.producers.gateway_support import FakePublisher, gateway
from tests.streams.policy_server_support import listening, make_model, served

TURNS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "m", seed=1)


async def converse(url: str, *, streamed: bool) -> None:
    """Four turns of one attempt."""
    messages: list[Any] = []
    async with openai.AsyncOpenAI(base_url=f"{url}/rollout/r/attempt/a/v1", api_key="none", max_retries=0) as agent:
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"{turn + 3} pens and {turn} more?"})
            options: Any = {"model": "policy", "messages": messages, "max_tokens": 24}
            if streamed:
                chunks = [chunk async for chunk in await agent.chat.completions.create(stream=True, **options)]
                said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                assert chunks[0].choices[0].delta.role == "assistant"
                assert chunks[-1].choices[0].finish_reason in ("stop", "length")
            else:
                answer = await agent.chat.completions.create(**options)
                said = answer.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": said})


def trajectory_of(publisher: FakePublisher) -> Trajectory:
    finished = RolloutFinished(rollout_id="r", attempt_id="a", attempts=1, status="succeeded", mode="train")
    reward = Reward(rollout_id="r", attempt_id="a", value=1.0)
    spans = [encode(span, 1_000_000) for span in publisher.spans]
    return assemble(finished, Announcement(), spans, [encode(reward, 1_000_000)]).trajectory


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("exact", [True, False])
async def test_the_tokens_of_earlier_turns_are_those_that_were_sampled(
    model: Path, exact: bool, streamed: bool
) -> None:
    publisher = FakePublisher()
    async with served(model=model) as server, listening(server) as backend_url:
        await server.load(model, "7")
        for _ in range(1 if exact else 8):  # by chance a whole conversation may be written as it was sampled
            publisher = FakePublisher()
            async with gateway(publisher, backend_url, exact_prompts=exact) as url:
                await converse(url, streamed=streamed)
            if len(trajectory_of(publisher).sequences) > 1:
                break
    assert not publisher.dead
    assert [span.status for span in publisher.spans] == ["ok"] * TURNS
    assert all(part.version == 7 for span in publisher.spans for part in span.weight_versions)
    trajectory = trajectory_of(publisher)
    assert trajectory.partial == ""
    assert trajectory.calls == TURNS
    assert sum(sum(sequence.loss_mask) for sequence in trajectory.sequences) == sum(
        len(span.response_token_ids) for span in publisher.spans
    )
    if exact:
        assert len(trajectory.sequences) == 1, "every turn goes on with the tokens of the one before"
        for before, after in zip(publisher.spans, publisher.spans[1:], strict=False):
            whole = [*before.prompt_token_ids, *before.response_token_ids]
            assert after.prompt_token_ids[: len(whole)] == whole
    else:
        assert len(trajectory.sequences) > 1, "the template's own tokens drift from what was sampled"


async def test_answers_do_not_differ_from_those_of_the_chat_route(model: Path) -> None:
    """Greedy, a first turn each: same prompt, so the same answer, in every field that the agent sees."""
    seen: list[dict[str, Any]] = []
    for exact in (True, False):
        publisher = FakePublisher()
        async with served(model=model) as server, listening(server) as backend_url:
            await server.load(model, "7")
            async with gateway(publisher, backend_url, exact_prompts=exact) as url:
                base = f"{url}/rollout/r/attempt/a/v1"
                async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as agent:
                    answer = await agent.chat.completions.create(
                        model="policy",
                        messages=[{"role": "user", "content": "2 pens and 3 more?"}],
                        temperature=0,
                        max_tokens=12,
                        n=2,
                        logprobs=True,
                    )
        assert [len(span.response_token_ids) for span in publisher.spans] == [
            len((choice.logprobs and choice.logprobs.content) or []) for choice in answer.choices
        ]
        fields = answer.model_dump(exclude={"id", "created"})
        seen.append({name: value for name, value in fields.items() if value is not None})
    assert seen[0]["choices"] == seen[1]["choices"]
    assert seen[0]["usage"] == seen[1]["usage"]
    assert seen[0].keys() == seen[1].keys()
