"""`fulgurite replay`: rows of a topic, from an offset or a time on, made once more from Kafka; none lost, none doubled.

    Kafka ─► run.py: a chunk ─► store.py: which rows are there? ─► in_<topic> ─► the topic's table | dead_letters
                │                                                       (the materialiser's own way)
                └─► marks.py: replay_log, what was begun and how far it is

It fills in what the tables lack. With --rebuild it makes all rows of the range anew, as after a migration that reads
more out of the same bytes, and then deletes the old ones.

It keeps away from the running materialiser: only offsets below the end of `ingest_log` are touched, and those the
materialiser never inserts again. It keeps away from what Kafka has forgotten: only rows of records that were read just
now are ever deleted, and only if they have their records' times: where the log is another one than that of the rows,
they may be all that is left of theirs.

The contract, for one partition. The code carries these numbers.

    0  begin    0.1 Ask whether Kafka's logs are still those whose records the tables have, as the materialiser does in
                    its own 0.1. Refused where one is not, also when the same command is given again.
                0.2 `begun` in replay_log for every partition, with range and time (the server's clock).
                0.3 Look: where another unfinished replay of this topic is there, withdraw and refuse. The same command
                    given again goes on with its own unfinished replay, behind the last `part`.
                0.4 Claim every partition: a fence as the materialiser's (its fences.py), of replays alone. From now on
                    the server refuses each insert of a replay of them that begins with another one. Wait as 2 does, and
                    only then read how far it is: of whoever claimed before, nothing comes any more. Refused where it
                    was ended meanwhile, or is `ending`.
                0.5 --abandon, after 0.4, in place of 1 to 5: `ending`, guarded by the claim. Of a --rebuild then 4 for
                    what is `whole`, and behind that it takes back what was made anew: rows ingested between `begun`
                    and `ending` go where older ones are. At last `abandoned`.
    1  read     A chunk of records.
    2  ask      Where nobody knows what became of an insert of ours, claim anew, lower than whoever claimed since: it
                is refused if it comes now. Wait until no insert of a replay of the partition runs, ask which offsets
                are in which table; a dead letter of GIVEN_UP is all of its record. --rebuild: only rows ingested since
                `begun` are there; older ones are to be replaced. Refused where a row, of whatever age, has another time
                than the record at its offset: the log is another one, for which 0.1 need not have found a row.
    3  insert   What is missing: one block, guarded by the claim. Each table takes its part wholly or not at all. One
                that needs more memory than there is, or more time: both halves of its range by 2 and 3, each. One
                record that does: this process ends, and says so. Refused by its guard: the partition is another
                replay's, and this process ends.
    4  delete   --rebuild, after some chunks: `whole`, lo..hi has all that will ever be there of it anew; guarded by
                the claim. Then rows ingested before `begun` go, of offsets that have rows since `begun`.
    5  log      `part`: lo..hi is done. After the last: `done`.

A crash after
    0           nothing was done; the same command goes on, with a greater claim.
    3           2 finds the rows. A chunk that reached one table of two is completed.
    3 (rebuild) old and new rows are both there: twice in the tables (`reconciliation` says so), once in the views,
                until the same command has done 4. In the other order, rows would be missing meanwhile, and lost for
                good where Kafka forgets them before somebody comes back.
    4           what is left to delete is deleted: the same command finds all rows in 2, and does 4 again.
    5           nothing to do.
    0.5         `--abandon` again; the same command is refused. What is `whole` and what is not can change no more.

Two at once: of the same command given twice, the later one has the claim; the other ends at its next insert, whenever
that is. So does a replay that was frozen anywhere, was ended with --abandon or finished by another process meanwhile,
and wakes: whoever inserted since had claimed first, and asked only then. What it may still do is true or harmless:
`part` and `done` of what was done, and a delete: 4 of what is `whole`, where nobody takes back anything, or 0.5 of rows
from before `ending`, where nobody replaces any. For `whole` and `ending` pass their guard or are refused as inserts of
records are: who claimed later knows of them, or they do not happen. Without that, 4 could delete old rows beside new
ones while 0.5 deletes the new ones beside the old.

Another range or mode is refused until the first is finished or abandoned.
"""
