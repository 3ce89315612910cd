"""From logits, or from hidden states and the LM head, to log-probs, losses and gradients."""
