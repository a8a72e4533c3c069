"""The ring controller."""
