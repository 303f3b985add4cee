"""The translator: rewards that arrive inside OTLP spans, published to the topic `rewards`, where assemblers look for
them. The spans themselves are the materialiser's (and nobody else's: a record nobody can decode becomes its dead
letter).

    consumes     otlp_spans, as any Collector wrote it
    produces     rewards (key rollout_id); dead_letters for rewards whose value is none, or which no record has room for
    waits for    the broker's acknowledgement of every reward of a batch
    unblocked by the acknowledgement; a broker that is away is waited for, for ever

The contract, for one batch. service.py carries these numbers.

    1  read      records, from the committed offsets on. Most are passed over: their bytes hold no tell-tale name.
    2  publish   their rewards in the order of the log; every one is acknowledged before the next step.
    3  commit    the offsets behind the batch; also where there was none and they are not known yet, or moved past what
                 is no record: the assembler waits for rewards until these reach the ends of the logs, if there are any.

A crash (or a rebalance) after
    1            nothing was done: the batch is read again.
    2            the rewards are published again, under the same reward_id (made from rollout, attempt, trace, span and
                 place in it): assembler and views count each once.
    3            nothing to do.
"""

from fulgurite.consumers.translator.service import main, serve

__all__ = ["main", "serve"]
