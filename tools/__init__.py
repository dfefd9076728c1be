"""What `make` runs: demo, chart, simulation, benchmark, mutation testing."""
