"""Candidates for the next step, and the step pairs made from them."""
