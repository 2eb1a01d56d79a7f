"""LongNet's dilated attention as torchscale computes it, on PyTorch's fused attention for CPUs.

torchscale (https://github.com/microsoft/torchscale, `torchscale/component/dilated_attention.py`) needs a GPU library for the
attention inside a segment. Here is the same computation, equation for equation, with PyTorch's own fused kernel in that place:

1. cut the sequence into segments, keep every r-th position, with an offset for each block of heads (`thin_out`);
2. attention with its log-sum-exp inside each segment;
3. put outputs and log-sum-exps back where their positions are, zero and minus infinity elsewhere (`spread`);
4. add the branches up, weighed by the softmax of their log-sum-exps; as there, no gradient passes through the weights.

Tensors are laid out and copied as there, since time and memory depend on it. The forward pass is LongNet's. Because of 4, the
gradients of queries and keys are not those of the function that is computed; the gradient of the values is.
"""

import torch

from attention import FullAttention

# torchscale's stand-in for minus infinity: its exponential is zero, and its difference from itself is not NaN.
NOTHING = -1e8


class DilatedAttention(FullAttention):
    """Tensors [1, length, heads, head_dim], as torchscale has them; lengths and rates divide evenly."""

    def __init__(self, work, tensors=None):
        super().__init__(work, tensors)
        self.inputs = [rows_first(tensor.detach()).requires_grad_(work.backward) for tensor in self.inputs]
        if work.backward:
            self.grad_output = rows_first(self.grad_output)

    def attend(self):
        """Output [1, length, heads, head_dim]."""
        pattern = list(zip(self.work.segment_lengths, self.work.dilation_rates))
        sparse = [self.branch(segment, rate) for segment, rate in pattern]
        outputs = [spread(output, rate) for (output, _), (_, rate) in zip(sparse, pattern)]
        log_sum_exps = [spread_log_sum_exp(log_sum_exp, rate) for (_, log_sum_exp), (_, rate) in zip(sparse, pattern)]
        mixed = sum(output * weight for output, weight in zip(outputs, branch_weights(log_sum_exps)))
        return rows_first(mixed)

    def forward_and_backward(self):
        output, gradients = super().forward_and_backward()
        return output.transpose(1, 2), [gradient.transpose(1, 2) for gradient in gradients]

    def branch(self, segment, rate):
        """Output and log-sum-exp of one branch, [segments, heads, rows, head_dim] and [segments, heads, rows]."""
        query, key, value = (thin_out(tensor, segment, rate) for tensor in self.inputs)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, self.work.causal)


def rows_first(tensor):
    """[1, heads, length, head_dim] to [1, length, heads, head_dim], in memory too."""
    return tensor.transpose(1, 2).contiguous()


def thin_out(tensor, segment, rate):
    """[1, length, heads, head_dim] to [segments, heads, segment / rate, head_dim]: block j of the heads keeps positions
    j, j + rate, ... of a segment."""
    _, length, heads, head_dim = tensor.shape
    blocks = tensor.view(length // segment, segment // rate, rate, rate, heads // rate, head_dim)
    kept = torch.diagonal(blocks, dim1=2, dim2=3)  # [segments, rows, heads of a block, head_dim, block]
    kept = kept.permute(0, 1, 4, 2, 3).reshape(-1, segment // rate, heads, head_dim)
    return kept.transpose(1, 2).contiguous()


def spread(rows, rate):
    """The way back, [segments, heads, rows, head_dim] to [1, heads, length, head_dim], with zeros between."""
    segments, heads, count, head_dim = rows.shape
    blocks = rows.transpose(1, 2).reshape(segments, count, rate, heads // rate, head_dim).permute(0, 1, 3, 4, 2)
    dense = torch.diag_embed(blocks, dim1=4, dim2=5)  # [segments, rows, heads of a block, head_dim, offset, block]
    dense = dense.permute(0, 5, 2, 1, 4, 3).reshape(segments, heads, count * rate, head_dim)
    return dense.transpose(0, 1).reshape(1, heads, -1, head_dim)


def spread_log_sum_exp(log_sum_exp, rate):
    """[segments, heads, rows] to [1, heads, length, 1], with minus infinity between."""
    segments, heads, count = log_sum_exp.shape
    blocks = log_sum_exp.view(segments, rate, heads // rate, count).permute(0, 3, 2, 1)
    dense = torch.diag_embed(blocks, dim1=3, dim2=4)  # [segments, rows, heads of a block, offset, block]
    dense = dense.masked_fill(dense == 0, NOTHING)
    return dense.permute(4, 2, 0, 1, 3).reshape(1, heads, -1, 1)


@torch.no_grad()
def branch_weights(log_sum_exps):
    """Softmax over the branches."""
    largest = torch.stack(log_sum_exps).amax(0)
    shares = [torch.exp(log_sum_exp - largest) for log_sum_exp in log_sum_exps]
    total = torch.stack(shares).sum(0)
    return [share / total for share in shares]
