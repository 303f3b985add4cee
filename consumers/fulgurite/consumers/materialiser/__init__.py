"""The materialiser: every record of every topic becomes exactly one row in ClickHouse, or one dead letter; where a
record holds several spans or rewards, each of them does.

    consumes     all topics of schemas.topics, read_committed, raw bytes: Python decodes no JSON, and of OTLP only what
                 ClickHouse refused to read
    produces     rows: in_<topic> (stores nothing) -> materialised views -> the topic's table | dead_letters
    waits for    ClickHouse's answer to an insert, one or two at once; records are fetched meanwhile, within bounds
    unblocked by the answer. Transient errors are retried for ever; a record no table takes is a dead letter

    watch.py ─► 0, when a log changed; history.py: is it the one that the tables know
    Kafka ─► fetch.py ─► partition.py ─► topic.py ─► store.py ─► ClickHouse
             │           what waits      one insert   │
             │                           for all      fences.py: who may insert
             └─► producers.raw: what aiokafka raises on  service.py: wires it, and does 2 and 3

The contract, for the partitions of a topic that a consumer was assigned, or whose last insert nobody knows the end of.
The code carries these numbers.

    0  settle   0.1 Ask the log of inserts where each of them ends (L). Look whether Kafka's log is still the one whose
                    records the tables have (history.py): that it reaches to L, that records before L and where
                    leaders' epochs begin have the times of their rows, that the topic has the id it had. A partition
                    that has another log stands still, not ready, says what to do, and is looked at again every 5 s;
                    the others go on.
                0.2 Commit L with our generation: Kafka refuses it from a consumer that is no longer of the group.
                0.3 Write a fence with a greater epoch than any, for all of them. From now on the server refuses each
                    insert that begins with another one (fences.py says why that holds).
                0.4 Wait until no insert that has one of them runs: those that had begun.
                0.5 Ask the tables which offsets from L on they have. Nobody adds to them any more but us. Read from L
                    on, skip what is there. What we know to have inserted counts for nothing: the database may be an
                    older copy of what it was, and what it lacks is read again.
                From then on every record that Kafka gives is appended in the order of the log. After any error of a
                fetch, whose records are gone with the positions advanced, the partitions that were asked are sought
                back to what is wanted next. One that cannot be decoded is a dead letter (`undecodable`); where a whole
                batch cannot be read, its partition stands still and is tried again, not ready.
                A partition whose topic's id or leader's epoch is another one than when it was settled, whose log ends
                before what was read or lacks what is wanted next (watch.py, fetch.py), forgets what it read and has not
                taken, and goes back to 0. What it inserted of another log until then is found by 0.1: that log
                began where an epoch does.
    1  insert   One block of records of several partitions, one synchronous insert, guarded by their fences and by an
                entry of each in the log of inserts, which a database that went back has no more. Of a record
                a table takes all rows or none. Refused by its guard, no answer, an error: back to 0 with all
                partitions of the insert, so that one still on its way is refused, and insert what is missing then. An
                insert that the server refuses for what is in it left nothing: OTLP is then written so that it can be
                read (consumers/otlp/mend.py), anything else is halved down to the record that nobody will take. Records
                that are no OTLP, or of too many lines, are known without the server: however many there are, they are
                dead letters with one insert of their own, before the others. One
                that needs too much memory or time is made smaller. A record that fails so alone, and that is large
                enough to be to blame, goes alone from then on, one of all topics at a time, and gets more time at each
                try; at last it is one dead letter, `too_large` or `too_slow` (lone.py), which in 0.5 stands for all of
                it; one that has rows already is tried on. However long an insert may take, one whose client gave up
                may happen until 0.4 saw it end.
    2  log      ingest_log: lo..hi is in, and at which offsets before hi Kafka has no record, or is still to be asked
                (skipped.py). Within some seconds, for all partitions at once. What Kafka says later of a range is
                logged with that range once more, if the log still has it. Where that fails, back to 0: the database
                that comes back may lack what was to be logged. Every 15 s the entries of 1 are looked for, also where
                nothing is inserted.
    3  commit   Offset hi + 1: a hint for lag monitors.

A crash after
    0.1, 0.2    nothing was done, but that lag monitors may see L for what was committed.
    0.3         the fence refuses everybody; whoever comes next takes a greater one.
    0.5         nothing was done.
    1, begun    some tables have their part, others not: step 0 finds what is missing by table and offset. A record of
                one event belongs in exactly one table (its own or dead_letters); lines of a record of several may
                belong in both, so such a record is done when each of the two has rows of it, and is otherwise
                inserted again for the table that has none (`_into`; that one may have none to take).
    1           the rows are there and not in the log: step 0 finds them by offset and skips them.
    2           the commit is behind: L is not.
    3           nothing to do.

A stop that takes longer than materialiser.stop_seconds, because a store does not answer, ends as a crash does.

A zombie, which was frozen anywhere and is no longer of the group, is refused by 0.3 of its successor with every insert
that begins after it, and by Kafka in 0.2. If it was frozen between 0.2 and 0.3 it takes the fence from its successor,
once: that one's next insert is refused and it settles again; the zombie's is refused then, and its 0.2 tells it.

What lies in the log only after it was done, and no fence protects it: an entry of a zombie that comes late is true.
"""

from fulgurite.consumers.materialiser.service import main, serve

__all__ = ["main", "serve"]
