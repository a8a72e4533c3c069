"""The shard: owns slots, orders messages, makes them durable before it acknowledges, serves replay and publishes."""
