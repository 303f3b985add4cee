-- Merging is most of what a span costs the engine, more than parsing and writing it. Parts are merged when about sixteen of a
-- size have come together, not five: half as often, for some dozens of parts more, of which a question about a rollout
-- reads one granule each.
ALTER TABLE spans MODIFY SETTING merge_selector_base = 16;
