# SPDX-License-Identifier: Apache-2.0
"""The linear route: hidden states and the LM head in; the logits exist a chunk at a time."""
