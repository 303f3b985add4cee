"""OTLP: what the Collector writes to `otlp_spans`, for the materialiser (batches) and the translator (spans)."""
