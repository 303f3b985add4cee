"""Algorithms: programs that follow the log and publish what they conclude from it, each input exactly once.

    from fulgurite.streams.algorithms import algorithm

    @algorithm()
    def short_answers(trajectory):
        yield Reward(rollout_id=trajectory.rollout_id, name="short", value=...)

definition.py   what `@algorithm` makes of a function, and what it may read
calls.py        a user's function, called where it may hang or exit
events.py       what it may yield, and where that goes
groups.py       pure: which groups are open, complete, or too old
memory.py       Kafka: what is remembered of open groups, and the beginning of a first start
work.py         one input's way through the function: tries, time limits, dead letters
program.py      inputs between what was read and what is committed
service.py      the flow and its delivery contract: begin here
compliance.py   pure: rules of conduct, and what in the spans violates them
aggregator/     an algorithm of ours: rewards from functions, judges and rules
prompts/        another program: the search for a better prompt template
"""

from fulgurite.streams.algorithms.definition import Algorithm, InputRefused, algorithm

__all__ = ["Algorithm", "InputRefused", "algorithm"]
