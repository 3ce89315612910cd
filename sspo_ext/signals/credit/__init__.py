"""Advantages from values and rewards: GAE over steps, and outcome baselines."""
