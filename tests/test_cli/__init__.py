"""The command `fleetlm`."""
