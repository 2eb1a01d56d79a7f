"""PyTorch's side of the comparison that `cargo run --release --bin compare` makes.

Reads one JSON request per line on standard input and answers each with one JSON line on standard output; `Request` and
`Answer` in `benches/src/compare/protocol.rs` are the same messages in Rust. The first line, the version of PyTorch, comes unasked.

    {"do": "prepare", "work": {...}}   draws the tensors                              -> "ready"
    {"do": "warm_up"}                  one pass, not timed                            -> "ready"
    {"do": "time"}                     one pass                                       -> {"seconds": 0.25}
    {"do": "peak"}                     one pass, and the memory it needed             -> {"bytes": 1000000}
    {"do": "compute", "work": {...}, "query": [...], "key": [...], "value": [...], "grad_output": [...]}
                                       a pass over these numbers                      -> {"numbers": {"output": [...], "grad_value": [...]}}

A request that fails is answered with {"error": "..."}. With `--rank` and `--store`, the process is one rank of PyTorch's own
ring attention; the ranks meet in the file that `--store` names.
"""

import argparse
import json
import sys
import time
import warnings

import torch

from attention import FullAttention
from longnet import DilatedAttention
from memory import peak_bytes, resident_bytes
from ring import RingAttention, join_group, wait_for_all
from work import Work


class Worker:
    """Holds the prepared work between requests."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.attention = None

    def answer(self, request):
        return getattr(self, request.pop("do"))(**request)

    def prepare(self, work):
        self.attention = None  # frees the tensors of the work before
        self.attention = self.attention_of(Work(**work))
        return "ready"

    def warm_up(self):
        self.run()
        return "ready"

    def time(self):
        wait_for_all(self.world_size)
        start = time.perf_counter()
        self.run()
        return {"seconds": time.perf_counter() - start}

    def peak(self):
        before = resident_bytes()
        self.run()
        return {"bytes": peak_bytes() - before}

    def compute(self, work, **tensors):
        attention = self.attention_of(Work(**work), tensors)
        output, (_, _, grad_value) = attention.forward_and_backward()
        return {"numbers": {"output": output.flatten().tolist(), "grad_value": grad_value.flatten().tolist()}}

    def attention_of(self, work, tensors=None):
        if self.world_size > 1:
            return RingAttention(work, self.world_size, tensors)
        kind = DilatedAttention if work.segment_lengths else FullAttention
        return kind(work, tensors)

    def run(self):
        """One pass; of a ring, until every rank is done."""
        if self.attention.work.backward:
            self.attention.forward_and_backward()
        else:
            self.attention.forward()
        wait_for_all(self.world_size)


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--store", help="file where the ranks of a ring meet")
    return parser.parse_args()


def say(answer):
    print(json.dumps(answer), flush=True)


def main():
    warnings.filterwarnings("ignore")
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.rank)
    if options.world_size > 1:
        join_group(options.rank, options.world_size, options.store)
    worker = Worker(options.world_size)
    say({"torch": torch.__version__})
    for line in sys.stdin:
        try:
            say(worker.answer(json.loads(line)))
        except Exception as error:  # the other side decides what a failed request means
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
