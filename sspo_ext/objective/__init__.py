"""What one call minimises: its checked arguments, the sums over steps, and the loss of those sums."""
