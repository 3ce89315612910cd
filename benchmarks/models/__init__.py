"""Benchmarks on real language models and their families."""
