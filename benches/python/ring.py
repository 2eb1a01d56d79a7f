"""PyTorch's own ring attention, one rank of it.

`context_parallel` has no operation for CPUs, so the loop inside it is called directly, with PyTorch's fused CPU kernels for the
blocks and gloo for the exchange. Causal work is balanced as PyTorch balances it: rank r holds chunks r and 2P-1-r of 2P.
"""

import os

import torch
import torch.distributed as dist

aten = torch.ops.aten
SEQUENCE_DIM = 2


def join_group(rank, world_size, store):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def wait_for_all(world_size):
    if world_size > 1:
        dist.barrier()


class RingAttention:
    """Own rows of tensors [1, heads, length, head_dim]."""

    def __init__(self, work, world_size, tensors=None):
        from torch.distributed.tensor.experimental._context_parallel import _attention

        self.work = work
        self.loop = _attention
        _attention.set_rotate_method("alltoall")  # a ring: the other method gathers all keys everywhere
        _attention._cp_options.enable_load_balance = work.causal
        shape = (1, work.heads, work.length // world_size, work.head_dim)
        numbers = tensors or {}
        names = ("query", "key", "value", "grad_output")
        self.query, self.key, self.value, self.grad_output = (work.tensor(shape, numbers.get(name)) for name in names)

    @torch.no_grad()
    def forward(self):
        output, log_sum_exp, *_ = self.loop._templated_ring_attention(
            dist.group.WORLD,
            SEQUENCE_DIM,
            block_forward,
            query=self.query,
            key=self.key,
            value=self.value,
            is_causal=self.work.causal,
        )
        return output, log_sum_exp

    @torch.no_grad()
    def forward_and_backward(self):
        output, log_sum_exp = self.forward()
        gradients = self.loop._templated_ring_attention_backward(
            dist.group.WORLD,
            SEQUENCE_DIM,
            block_backward,
            grad_out=self.grad_output,
            grad_out_name="grad_out",
            query=self.query,
            key=self.key,
            value=self.value,
            out=output,
            logsumexp=log_sum_exp,
            is_causal=self.work.causal,
        )
        return output, gradients[:3]


def block_forward(query, key, value, is_causal=False, **_):
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)


def block_backward(*, grad_out, query, key, value, out, logsumexp, is_causal, **_):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, is_causal
    )
