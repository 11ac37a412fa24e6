"""Comparisons and measurements, runnable by anyone; see benchmarks/README.md."""
