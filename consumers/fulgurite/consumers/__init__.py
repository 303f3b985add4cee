"""Services that read the log: coordinator, materialiser, follower. They know schemas and producers, not streams."""
