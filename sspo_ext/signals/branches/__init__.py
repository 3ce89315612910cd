"""Many continuations of few sequences, scored or sampled, with the shared context computed once."""
