"""One runnable file for each experiment."""
