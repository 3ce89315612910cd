"""Values of steps: how likely the model is to give the right answer if it must answer now."""
