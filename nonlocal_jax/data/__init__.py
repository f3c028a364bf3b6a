"""Data: what feeds the networks."""
