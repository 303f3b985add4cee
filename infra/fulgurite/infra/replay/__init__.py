"""`fulgurite replay`: rows of a topic, from an offset or a time on, made once more from Kafka; none lost, none doubled.

    Kafka ─► run.py: a chunk ─► store.py: which rows are there? ─► in_<topic> ─► the topic's table | dead_letters
                │                                                       (the materialiser's own way)
                └─► marks.py: replay_log, what was begun and how far it is

It fills in what the tables lack. With --rebuild it makes all rows of the range anew, as after a migration that reads
more out of the same bytes, and then deletes the old ones.

It keeps away from the running materialiser: only offsets below the end of `ingest_log` are touched, and those the
materialiser never inserts again. It keeps away from what Kafka has forgotten: only rows of records that were read just
now are ever deleted.

The contract, for one partition. The code carries these numbers.

    0  begin    `begun` in replay_log for every partition, with range and time (the server's clock). Then look: where
                another unfinished replay of this topic is there, withdraw and refuse. The same command given again goes
                on with its own unfinished replay, behind the last `part`.
    1  read     A chunk, its bounds given by the log alone: the same ones whoever reads it.
    2  ask      Wait until no insert of ours runs, ask which offsets are in which table. --rebuild: only rows ingested
                since `begun` are there; older ones are to be replaced.
    3  insert   What is missing: one block, token replay-partition-lo-hi. Each table takes its part wholly or not at
                all. One that needs more memory than there is: both halves of its range by 2 and 3, each.
    4  delete   --rebuild, after some chunks: rows ingested before `begun`, of offsets that have rows since `begun`.
    5  log      `part`: lo..hi is done. After the last: `done`.

A crash after
    0           nothing was done; the same command goes on.
    3           2 finds the rows. A chunk that reached one table of two is completed.
    3 (rebuild) old and new rows are both there: twice in the tables (`reconciliation` says so), once in the views,
                until the same command has done 4. In the other order, rows would be missing meanwhile, and lost for
                good where Kafka forgets them before somebody comes back.
    4           there is nothing left to delete: it is done again and finds nothing.
    5           nothing to do.

Two at once: the same command twice does the same work twice, and each table refuses the second block by its token,
unless memory made one of them halve just what the other inserted whole since it asked: then rows are there twice, which
`reconciliation` says and the views do not count. A delete never meets a new row. Another range or mode is refused until
the first is finished or abandoned.
"""
