"""The assembler: from lifecycle events, spans and rewards to one trajectory per rollout, exactly once.

join.py       pure: the calls of an attempt become token sequences; with its rewards, a trajectory
assembly.py   pure: which rollouts are open, which have ended, what is late or belongs to nobody
offsets.py    pure: where each input stands, and what a restart must read again
inputs.py     Kafka: readers, end offsets, records read a second time
service.py    the flow and its delivery contract: begin here
"""

from fulgurite.streams.assembler.service import main, serve

__all__ = ["main", "serve"]
