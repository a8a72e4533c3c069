"""The command `fleetlm`: one module a command, `supervisor` and `children` for `fleetlm up`.

Starts components as processes and imports none of their insides, except the shard's offline log check.
"""
