"""Tests of the gateway: its inner half against scripted shards, its outer half against real sockets."""
