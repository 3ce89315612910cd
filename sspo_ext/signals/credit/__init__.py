"""From values and rewards to advantages: GAE over steps, and outcome baselines."""
