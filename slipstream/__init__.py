"""Slipstream: JPEG bytes to named, deterministic, byte-exact random crops."""

__version__ = "0.1.0"
