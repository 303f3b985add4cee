"""The aggregator: rewards that others than the agent give, before a trajectory is trained on.

    assembler ──► attempts ──► functions, judges, rules ──► ONE transaction ──► trajectories, rewards, dead_letters

It is an algorithm like any other (streams/algorithms/service.py has the delivery contract), that reads what the
assembler made. So it waits for nothing: the barrier was passed, every span of the attempt is in the record. And nobody
waits for it but those who must: `trajectories` are ready to train on, as ever, and only this topic's place in the
stream has changed (assembler.output = attempts).

The alternatives need more. If the end of an attempt said which rewards are to come, the assembler would hold it until
they were there, with a deadline for each, and every restart would have to know what is still out. If the trainer
joined rewards, each trainer would have to. Here a reward is in its trajectory or the trajectory says why not.

The reward is  agent_weight * (what the agent gave) + sum of weight * clipped value of each source - cost of violations,
clipped. An attempt of which a required part is missing has no reward: its trajectory says `reward_failed`, trainers
drop it with that reason, and the attempt is a dead letter that says what failed. One of which records are missing is
not scored, and says `unscored` where a source or rules would have counted. Nothing is ever taken for 0.

combine.py    pure: the sum, and what it does to a trajectory
judges.py     a model that is asked over HTTP; a judge that is away is waited for
verdicts.py   what judges said before
scoring.py    all parts of one attempt's reward
service.py    the algorithm, and the command
"""

from fulgurite.streams.algorithms.aggregator.service import main, serve

__all__ = ["main", "serve"]
