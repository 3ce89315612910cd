# SPDX-License-Identifier: Apache-2.0
"""Of an installed wheel: the compiled module is there, and gives the loss and the gradient of the torch reference."""

import torch

from sspo_ext import StepLayout, step_pref_loss

torch.manual_seed(0)
logits = torch.randn(2, 9, 1003)
labels, step_ids = torch.randint(1003, (2, 9)), (torch.arange(9) // 3 - 1).expand(2, 9)
layout = StepLayout.from_step_ids(labels, step_ids)
found = []
for backend in ("cpu", "reference"):
    x = logits.clone().requires_grad_()
    loss = step_pref_loss(x, layout, backend=backend).loss
    found.append((loss.detach(), *torch.autograd.grad(loss, x)))
torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
print("the wheel works")
