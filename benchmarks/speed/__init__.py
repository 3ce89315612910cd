"""Time and memory of the losses beside their peers."""
