"""The materialiser: every record of every topic becomes exactly one row in ClickHouse, or one dead letter; where a
record holds several spans or rewards, each of them does.

    consumes     all topics of schemas.topics, read_committed, raw bytes: Python decodes no JSON, and of OTLP only what
                 ClickHouse refused to read
    produces     rows: in_<topic> (stores nothing) -> materialised views -> the topic's table | dead_letters
    waits for    ClickHouse's answer to one insert a partition; records are fetched meanwhile, within bounds
    unblocked by the answer. Transient errors are retried for ever; a record no table takes is a dead letter

    Kafka ─► service.py ─► partition.py: buffer, one batch at a time ─► store.py ─► ClickHouse
             (FastStream)      │
                               └─► offsets.py: intents and commits, one Kafka request for all partitions

The contract, for one partition. The code carries these numbers.

    0  resume   Read the intent lo..hi from Kafka. Wait until no insert of a predecessor runs. Ask ClickHouse, which is
                the truth, where the log of inserts ends (L) and which offsets from L on are in the tables. Read from
                L on, skip what is there; what is missing of lo..hi is written as lo..hi again, all of it at once.
    1  intent   Commit offset lo with metadata hi: "about to insert lo..hi". Kafka refuses it from a consumer that is no
                longer of the group, so a zombie does not get further.
    2  insert   One block, one synchronous insert, token topic-partition-lo-hi. Each table takes its part of the block
                wholly or not at all. No answer, or an error: wait until the server is done with it, ask which offsets
                are there, insert the others under the same token; again until it succeeds. An insert that the server
                refuses for what is in it left nothing, not even its token: OTLP is then written so that it can be read
                (consumers/otlp/mend.py), anything else is halved down to the record that nobody will take.
    3  log      ingest_log: lo..hi is in. At most a second later, for all partitions at once.
    4  commit   Offset hi + 1. A hint for lag monitors and step 0; usually said by the next intent, and never over it.

A crash after
    0           nothing was done.
    1           nothing is in the tables: lo..hi is inserted by whoever resumes.
    2, begun    some tables have their part, others not: step 0 finds what is missing by table and offset. A record of
                one event belongs in exactly one table (its own or dead_letters); lines of a record of several may
                belong in both, so such a record is done when each of the two has rows of it, and is otherwise
                inserted again for the table that has none (`_into`; that one may have none to take). If the
                predecessor's insert arrives only after they were asked (it was frozen between 1 and 2), it has the
                same token: each table refuses it.
    2           the rows are there and not in the log: step 0 finds them by offset and skips them.
    3           the commit is behind: L is not.
    4           nothing to do.

Why the interrupted range is written whole, or not yet. Its token may be used for all that is missing of lo..hi, once; a
part of it under this token would make each table refuse the rest, and a part under another token would come twice if a
zombie's insert of lo..hi still arrives. So neither a full buffer nor a slow broker cuts it short: it was one batch once
and fits into memory, and it is waited for until every offset up to hi was read, or the consumer's position has passed
hi and nothing came any more, which means that those offsets do not exist (compaction). Only then does 3 say hi.

Why the tables, and not the token alone: the server's memory of tokens is bounded and written apart from the rows. Why
the token, and not the tables alone: it stops an insert that arrives after they were asked.
"""

from fulgurite.consumers.materialiser.service import main, serve

__all__ = ["main", "serve"]
