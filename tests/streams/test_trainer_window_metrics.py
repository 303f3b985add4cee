"""What a step's record says of its window."""

from __future__ import annotations

from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.trainer.samples import training_set
from fulgurite.streams.trainer.window_metrics import window_metrics
from fulgurite.streams.trainer.windows import Member, Window


def sequence(resource: str, agent: str, prompt: int, response: int) -> TokenSequence:
    length = prompt + response
    return TokenSequence(
        token_ids=[1] * length,
        loss_mask=[0] * prompt + [1] * response,
        logprobs=[0.0] * prompt + [-1.0] * response,
        weight_versions=[VersionSpan(version=1, start=prompt, end=length)],
        resource=resource,
        agent=agent,
    )


def test_lengths_are_of_what_is_trained_on() -> None:
    """A critic of its own policy, and a judge that another trainer trains with this policy, talk much more."""
    group = [
        Member(
            Trajectory(
                rollout_id=f"r{number}",
                status="succeeded",
                reward=float(number),
                sequences=[
                    sequence("policy", "solver", 2, 3 + number),
                    sequence("critic", "critic", 50, 500),
                    sequence("policy", "judge", 40, 400),
                ],
            )
        )
        for number in range(2)
    ]
    window, settings = Window(1, [group], []), TrainerSettings(agents=["solver"])
    training = training_set(window, settings)
    assert sum(sum(sample.loss_mask) for sample in training.samples) == 3 + 4
    found = window_metrics(window, training, settings.resource, settings.agents)
    spread = [found[f"response_length/{of}"] for of in ("mean", "max", "min")]
    assert spread == [3.5, 4.0, 3.0]
    assert [found[f"prompt_length/{of}"] for of in ("mean", "max", "min")] == [2.0, 2.0, 2.0]
    every = window_metrics(window, training, settings.resource)
    assert every["response_length/max"] == 404.0, "without names: all agents of this policy"
