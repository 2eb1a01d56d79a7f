"""Full attention: PyTorch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F


class FullAttention:
    """Tensors [1, heads, length, head_dim], as scaled_dot_product_attention has them."""

    def __init__(self, work, tensors=None):
        self.work = work
        numbers = tensors or {}
        shape = (1, work.heads, work.length, work.head_dim)
        self.inputs = [work.tensor(shape, numbers.get(name)) for name in ("query", "key", "value")]
        if work.backward:
            self.grad_output = work.tensor(shape, numbers.get("grad_output"))
            for tensor in self.inputs:
                tensor.requires_grad_()

    def attend(self):
        return F.scaled_dot_product_attention(*self.inputs, is_causal=self.work.causal)

    def forward(self):
        with torch.no_grad():
            return self.attend()

    def forward_and_backward(self):
        output = self.attend()
        return output, torch.autograd.grad(output, self.inputs, self.grad_output)
