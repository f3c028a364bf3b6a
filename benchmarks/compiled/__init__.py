"""Compiles operations, blocks and networks for devices that need not exist."""
