"""Dead letters as an operator sees them: found, understood, mended, sent again, followed.

    dead_letters ─► letters.py: what was refused, where it lay, why ──► screens.py
                        │
                        ├─► mending.py: an expression over the record, checked against the topic's model
                        ├─► rules.py: whether sending it again makes sense
                        ▼
    dead_letter_actions ◄─ actions.py: mends, intents, what was sent ◄─ sending.py ─► the original topic
                        └─► dead_letter_replays: the row it became, or the reason it was refused again

The contract of a replay is in sending.py. Nothing here changes or deletes a dead letter.
"""
