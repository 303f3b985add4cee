"""Every shape that outlives a process: topics, events, settings, codec, tables. Imports nothing heavy."""
