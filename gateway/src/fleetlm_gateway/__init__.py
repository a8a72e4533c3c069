"""The gateway: holds clients' WebSockets and REST, routes by ring map, retries, queues, fans out; keeps no state."""
