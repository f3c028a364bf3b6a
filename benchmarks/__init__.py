"""What is claimed about speed, memory and precision, measured by one command: `python -m benchmarks`."""
