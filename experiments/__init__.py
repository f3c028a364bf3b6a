"""Runnable experiments, one per file. `shared` holds what several of them use."""
