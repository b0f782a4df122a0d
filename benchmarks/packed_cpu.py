"""Packed sequences on a CPU: match + merge against padding them, and all verbs against one sequence after another.

Run `python -m benchmarks.packed_cpu`.

Half of the tokens of every sequence merge away. Padded, the longest gives all their length; "as if all were real" is
what padding costs without a mask, and merges it with tokens. The work of putting tokens into padding and of taking them
out again is not counted, the memory of padding is: all of it is on top of the packed x. Contenders take turns in one
process, so that their ratio stands when the machine's speed does not.

What packing saves is the price of a call. "the products alone" is what the similarities of match take at the rate of a
bare product of the same depth: nothing that computes them, packed or not, takes less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sttm_kernels as sttm
from sttm_kernels.bench.timing import device_name, peak_bytes, time_in_turns
from sttm_kernels.testing import assert_equal

CPU = torch.device("cpu")
C, D, K = 384, 64, 16


def drawn(count: int, least: int, most: int) -> list[int]:
    """Lengths, uniform in their logarithm, with both ends among them."""
    share = torch.rand(count - 2, generator=torch.Generator().manual_seed(0))
    return [least, most, *(least * (most / least) ** share).int().tolist()]


def padded(rows: Tensor, lengths: list[int]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows.split(lengths)), batch_first=True)


def contenders(lengths: list[int]) -> tuple[dict[str, Callable[[], list[Tensor]]], dict[str, int]]:
    """What each merges to, one tensor for each sequence, and the bytes of its x on top of the packed one."""
    draw = torch.Generator().manual_seed(1)
    x, metric = (torch.randn(sum(lengths), width, generator=draw) for width in (C, D))
    wide_x, wide_metric = padded(x, lengths), padded(metric, lengths)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    amounts, keep = [n // 2 for n in lengths], [n - n // 2 for n in lengths]

    def packed() -> list[Tensor]:
        out = sttm.merge(x, sttm.match(metric, 0.5, lengths=lengths))
        return list(out.x.split(out.lengths))

    def with_mask() -> list[Tensor]:
        out = sttm.merge(wide_x, sttm.match(wide_metric, amounts, mask=mask))
        return [row[:n] for row, n in zip(out.x, keep, strict=True)]

    def as_if_real() -> list[Tensor]:
        return list(sttm.merge(wide_x, sttm.match(wide_metric, max(lengths) // 2)).x)

    def one_by_one() -> list[Tensor]:
        each = zip(x[None].split(lengths, 1), metric[None].split(lengths, 1), amounts, strict=True)
        return [sttm.merge(own, sttm.match(keys, r)).x[0] for own, keys, r in each]

    for got, expected in zip(packed(), one_by_one(), strict=True):
        assert_equal("packed", got, expected)
    for got, expected in zip(with_mask(), one_by_one(), strict=True):
        assert_equal("padded", got, expected)
    more = (wide_x.numel() - x.numel()) * x.element_size()
    calls = {"packed": packed, "padded, with a mask": with_mask, "padded, as if all were real": as_if_real}
    return {**calls, "one after another": one_by_one}, {name: more * name.startswith("padded") for name in calls}


def of_meta_tokens(lengths: list[int], gradients: bool) -> dict[str, dict[str, Callable[[], list[Tensor]]]]:
    """By verb: packed and one after another, with the gradients of x, q and meta or without."""
    draw = torch.Generator().manual_seed(1)
    x, q = (torch.randn(sum(lengths), width, generator=draw, requires_grad=gradients) for width in (C, D))
    meta = torch.randn(len(lengths), K, D, generator=draw, requires_grad=gradients)

    def found(outputs: list[Tensor]) -> list[Tensor]:
        if not gradients:
            return [torch.cat(outputs)]
        return list(torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, q, meta]))  # type: ignore[arg-type]

    calls: dict[str, dict[str, Callable[[], list[Tensor]]]] = {}
    for name, verb in {
        "assign_merge": lambda *given, **how: sttm.assign_merge(*given, temperature=0.1, **how)[0].x,
        "soft_merge": lambda *given, **how: sttm.soft_merge(*given, temperature=0.1, **how).x,
    }.items():

        def packed(verb: Any = verb) -> list[Tensor]:
            return found([verb(x, q, meta, lengths=lengths)])

        def one_by_one(verb: Any = verb) -> list[Tensor]:
            each = zip(x[None].split(lengths, 1), q[None].split(lengths, 1), meta.split(1), strict=True)
            return found([verb(*given)[0] for given in each])

        calls[name] = {"packed": packed, "one after another": one_by_one}
        for got, expected in zip(packed(), one_by_one(), strict=True):
            assert_equal(name, got, expected)

    return calls


def of_partitions(lengths: list[int]) -> dict[str, dict[str, Callable[[], list[Tensor]]]]:
    """By what is not every second token: packed and one after another; each sequence has a grid of about its length."""
    side = 8 if min(lengths) >= 64 else 4
    grids = [(n // side**2, side, side) for n in lengths]
    counts = [t * side**2 for t, _, _ in grids]
    metric = torch.randn(sum(counts), D, generator=torch.Generator().manual_seed(1))
    calls: dict[str, dict[str, Callable[[], list[Tensor]]]] = {}
    for name, how in {
        "match in windows": {"window": (2, 4, 4)},
        "match by frames": {"partition": "frames"},
        "match by random2d": {"partition": "random2d"},
        "match, a token protected": {"protect": [1]},
    }.items():

        def packed(how: dict[str, Any] = how) -> list[Tensor]:
            return [sttm.match(metric, 0.5, grid=grids, lengths=counts, generator=drawing(), **how).index[0]]

        def one_by_one(how: dict[str, Any] = how) -> list[Tensor]:
            draw, found, first = drawing(), [], 0
            for number, (own, grid) in enumerate(zip(metric[None].split(counts, 1), grids, strict=True)):
                mine = {**how, "protect": None} if number else how  # the token is in the first sequence
                plan = sttm.match(own, own.shape[1] // 2, grid=grid, generator=draw, **mine)
                found.append(plan.index[0] + first)
                first += plan.num_groups
            return [torch.cat(found)]

        calls[name] = {"packed": packed, "one after another": one_by_one}
        assert_equal(name, packed()[0], one_by_one()[0])
    return calls


def drawing() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def of_products(lengths: list[int]) -> float:
    """Microseconds for the products of src and dst at the rate of a bare one."""
    a = torch.randn(1024, D)
    b = a.T.contiguous()
    rate = 1024 * 1024 / time_in_turns({"": [lambda: a @ b]}, CPU, 0.2, least=3)[""].p50
    return sum((n - n // 2) * (n // 2) for n in lengths) / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="spent on each contender (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{device_name(CPU)}, {given.threads} threads, torch {torch.__version__}, float32, C = {C}, D = {D}")
    for least, most in ((64, 8192), (16, 256)):
        lengths = drawn(given.sequences, least, most)
        calls, more = contenders(lengths)
        samples = time_in_turns({name: [call] for name, call in calls.items()}, CPU, given.seconds, least=3)
        print(f"{len(lengths)} sequences of {least} to {most} tokens, {sum(lengths)} together")
        for name, call in calls.items():
            time, memory = samples[name].p50, peak_bytes(call, CPU) + more.get(name, 0)
            ratio = time / samples["packed"].p50
            print(f"  {name:28} {time / 1e3:9.2f} ms {ratio:6.2f} x {memory / 2**20:8.0f} MiB")
        print(f"  {'the products alone':28} {of_products(lengths) / 1e3:9.2f} ms")
        pairs = {**of_partitions(lengths), **of_meta_tokens(lengths, gradients=False)}
        pairs |= {f"{verb}, with gradients": pair for verb, pair in of_meta_tokens(lengths, gradients=True).items()}
        for name, pair in pairs.items():
            samples = time_in_turns({each: [call] for each, call in pair.items()}, CPU, given.seconds, least=3)
            times = [samples[each].p50 / 1e3 for each in ("packed", "one after another")]
            print(f"  {name:28} {times[0]:9.2f} ms, one after another {times[1]:9.2f} ms {times[1] / times[0]:6.2f} x")


if __name__ == "__main__":
    main()
