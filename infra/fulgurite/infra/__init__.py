"""The command line, the embedded Kafka and ClickHouse, supervision, the demo. Wires the other packages together."""
