"""From rows of text to batches: reading, checking, tokenising, collating, grading."""
