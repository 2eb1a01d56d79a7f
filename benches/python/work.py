"""What is to be computed, as a request says it."""

from dataclasses import dataclass

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """Self-attention of batch 1; without segment lengths, full attention."""

    heads: int
    length: int
    head_dim: int
    dtype: str
    causal: bool
    backward: bool
    segment_lengths: tuple = ()
    dilation_rates: tuple = ()

    def tensor(self, shape, numbers=None):
        """The numbers in this shape, or numbers drawn evenly from (-1, 1), as on the other side."""
        if numbers is not None:
            return torch.tensor(numbers, dtype=DTYPES[self.dtype]).view(shape)
        return torch.empty(shape).uniform_(-1, 1).to(DTYPES[self.dtype])
