"""The deterministic simulator: real components in a world whose every event comes from a seed (docs/simulator.md)."""
