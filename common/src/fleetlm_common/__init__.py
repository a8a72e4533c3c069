"""What every part of FleetLM shares.

Ids, slots, ring map, wire frames, errors, clock, logs, config. Imports no component.
"""
