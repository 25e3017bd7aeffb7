"""Backends: how the round loop's orders reach hosts."""
