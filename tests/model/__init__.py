"""Explicit-state models of our own rules, small scopes; see docs/moves.md."""
