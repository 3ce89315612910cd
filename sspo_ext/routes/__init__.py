# SPDX-License-Identifier: Apache-2.0
"""From logits, or from hidden states and the LM head, to log-probs, losses and gradients."""
