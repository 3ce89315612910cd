"""The logits route: one read forward; one read and one write backward."""
