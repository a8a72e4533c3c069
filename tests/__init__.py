"""The tests of FleetLM: one folder a component, real processes in integration, shared parts in support."""
