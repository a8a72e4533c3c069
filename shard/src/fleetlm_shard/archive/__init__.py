"""The archive: what a shard's log holds, copied to PostgreSQL by a process of its own (docs/archive.md)."""
