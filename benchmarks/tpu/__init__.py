"""Compiles operations, blocks and networks for TPUs, and reads what their compiler estimates."""
