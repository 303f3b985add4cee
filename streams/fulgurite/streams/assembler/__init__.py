"""The assembler: from lifecycle events, spans and rewards to one trajectory per rollout, exactly once.

join.py       pure: the calls of an attempt become token sequences; with its rewards, a trajectory
attempts.py   pure: the spans of an attempt, for the aggregator
building.py   pure: a trajectory in any case, of records that nobody thought of without data
assembly.py   pure: which rollouts are open, which have ended, what is late or belongs to nobody
waits.py      pure: which ended rollouts wait for rewards in OTLP, and how long at most
offsets.py    pure: where each input stands, and what a restart must read again
letters.py    pure: its dead letters
inputs.py     Kafka: readers, end offsets, records read a second time
translated.py Kafka: what the translator has read, asked for all that wait together
metrics.py    what Prometheus is told
service.py    the flow and its delivery contract: begin here
"""

from fulgurite.streams.assembler.service import main, serve

__all__ = ["main", "serve"]
