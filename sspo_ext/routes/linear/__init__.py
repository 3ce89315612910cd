"""The linear route: hidden states and the LM head in, logits a chunk at a time, never stored whole."""
