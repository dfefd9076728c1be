"""The demo and the benchmark."""
