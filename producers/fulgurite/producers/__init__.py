"""What writes events on the agents' side: publishers, exporter, runner, gateway. Never imports torch or ClickHouse."""
