"""Speed and memory, side by side with what a user would write by hand: `python -m benchmarks`."""
