"""How far two functions are apart, and a check of this machine's kernels against float64.

    differences = value_and_grad_difference(flash_attn_func, my_attention, q, k, v)
    print(max(x.relative for x in differences))

    python -m ringflash.testing                     # a table of errors next to torch's own
    python -m ringflash.testing --kernel blockwise --device cpu

The rule of the check: every result is at most twice as far from float64 as that of torch's
scaled_dot_product_attention in the same dtype, plus 1e-5. The exit code is 1 if a row of the table breaks it.

Legend: S tokens, H query heads, Hk key heads, D head dimension.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ringflash.errors import ArgumentError
from ringflash.functional import attention
from ringflash.kernels.select import NAMES, name_of, select
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.positions.mask import Mask

Result = Tensor | tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Difference:
    """Of one output, or of the gradient of one input.

    Attributes:
        name: "output 0", "gradient of input 2".
        largest: largest absolute difference; infinite where only one of the two is finite.
        relative: that, divided by the largest magnitude of the second function's tensor.
    """

    name: str
    largest: float
    relative: float


def value_and_grad_difference(
    a: Callable[..., Result], b: Callable[..., Result], *inputs: object, seed: int = 0
) -> tuple[Difference, ...]:
    """Compare the outputs of two functions, and the gradients of their inputs for one random gradient of the outputs.

    Args:
        a: takes the inputs, returns a tensor or a tuple of tensors (None among them is passed over).
        b: the same; the one to compare with.
        *inputs: what both are called with. Floating-point tensors are differentiated by, in copies.
        seed: for the gradient of the outputs.

    Returns:
        One `Difference` for each output, then one for each gradient.

    Raises:
        ArgumentError: the functions return different numbers of tensors, or tensors of different shapes.

    Example:
        >>> x = torch.linspace(0, 1, 5)
        >>> [round(d.largest, 3) for d in value_and_grad_difference(torch.sin, torch.tanh, x)]
        [0.08, 0.199]
    """
    first, second = (_value_and_grad(function, inputs, seed) for function in (a, b))
    if [(name, x.shape) for name, x in first.items()] != [(name, x.shape) for name, x in second.items()]:
        shapes = [{name: tuple(x.shape) for name, x in results.items()} for results in (first, second)]
        raise ArgumentError(f"a and b return different tensors: {shapes[0]} and {shapes[1]}")
    return tuple(_difference(name, first[name], second[name]) for name in second)


def _value_and_grad(function: Callable[..., Result], inputs: tuple[object, ...], seed: int) -> dict[str, Tensor]:
    arguments = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    leaves = {i: x.requires_grad_() for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.is_floating_point()}
    returned = function(*arguments)
    outputs = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if x is not None]
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    # Drawn in float64 on the CPU, so that functions in other dtypes and on other devices get the same.
    random = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in outputs]
    pairs = [(x, d.to(x)) for x, d in zip(outputs, cotangents, strict=True) if x.requires_grad]
    if pairs and leaves:
        # A row without keys has a log-sum-exp of -inf, which no gradient can reach.
        sums = [(torch.where(x.isfinite(), x, 0) * d).sum() for x, d in pairs]
        gradients = torch.autograd.grad(sums, list(leaves.values()), allow_unused=True, materialize_grads=True)
        results |= {f"gradient of input {i}": x for i, x in zip(leaves, gradients, strict=True)}
    return results


def _difference(name: str, x: Tensor, right: Tensor) -> Difference:
    largest = largest_difference(x, right)
    magnitude = right.double().abs().masked_fill(~right.isfinite(), 0).max().item() if right.numel() else 0.0
    return Difference(name, largest, largest / magnitude if magnitude else largest)


def largest_difference(x: Tensor, right: Tensor) -> float:
    """Largest absolute difference; infinite unless both are infinite at the same places."""
    if not right.numel():
        return 0.0
    x, right = x.double().cpu(), right.double().cpu()
    return (x - right).abs().masked_fill(x == right, 0).nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()


# The check of this machine

RESULTS = ("out", "lse", "dq", "dk", "dv")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
HEADS = ((4, 4), (4, 1))


def grid_masks(tokens: int) -> dict[str, Mask]:
    """One mask of every kind for sequences of `tokens`."""
    cut = tokens * 3 // 7
    return {
        "full": Mask.bidirectional(),
        "causal": Mask.causal(),
        "window": Mask.sliding_window(tokens // 5, tokens // 9),
        "window, sinks": Mask.sliding_window(tokens // 5, sink=4),
        "documents": Mask.causal() & Mask.documents([0, 1, cut, cut, tokens]),
        "prefix": Mask.prefix_lm(cut),
        "spans": Mask.causal([(1, cut), (cut, tokens - 1)]),
        "shared prefix": Mask.shared_prefix([cut, 1], [[1, cut // 2], [tokens - 2 - cut - cut // 2]]),
        "chunked": Mask.causal() & Mask.chunked(tokens // 3),
    }


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    mask: Mask
    dtype: torch.dtype
    head_dim: int
    heads: tuple[int, int]
    tokens: int

    def errors(self, device: str, kernel: str) -> tuple[dict[str, float], dict[str, float]]:
        """Largest errors of ringflash and of torch against float64."""
        random = torch.Generator().manual_seed(0)
        shapes = [(1, self.tokens, heads, self.head_dim) for heads in (self.heads[0], *[self.heads[1]] * 2)]
        tensors = [torch.randn(x, generator=random).to(device, self.dtype) for x in shapes]
        gradients = (
            torch.randn(shapes[0], generator=random),
            torch.randn(1, self.heads[0], self.tokens, generator=random),
        )
        gradients = tuple(x.to(device) for x in gradients)
        exact = _solve(self._exact, [x.double() for x in tensors], gradients)
        ours = _solve(lambda *x: attention(*x, mask=self.mask, group=ONE_DEVICE, kernel=kernel), tensors, gradients)
        theirs = _solve(self._torch, tensors, gradients)
        of_ours, of_theirs = (
            {name: largest_difference(x, right) for name, x, right in zip(RESULTS, results, exact, strict=True)}
            for results in (ours, theirs)
        )
        return of_ours, of_theirs

    def _exact(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """By definition, from the mask's own words."""
        q, k, v = self._heads_first(q, k, v)
        scores = self._scores(q, k)
        return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)

    def _torch(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self._heads_first(q, k, v)
        out = scaled_dot_product_attention(q, k, v, attn_mask=self._visible(q)).transpose(1, 2)
        return out, self._scores(q.float(), k.float()).logsumexp(-1)

    def _heads_first(self, *tensors: Tensor) -> Iterator[Tensor]:
        return (x.transpose(1, 2).repeat_interleave(self.heads[0] // x.shape[2], dim=1) for x in tensors)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT * self.head_dim**-0.5).masked_fill(~self._visible(q), -torch.inf)

    def _visible(self, q: Tensor) -> Tensor:
        return _dense(self.mask, self.tokens).to(q.device)


@functools.lru_cache(maxsize=16)
def _dense(mask: Mask, tokens: int) -> Tensor:
    return torch.tensor([[mask.sees(query, key) for key in range(tokens)] for query in range(tokens)])


def _solve(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], gradients: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    results = function(*leaves)
    given = [d.to(x.dtype) for d, x in zip(gradients, results, strict=True)]
    return (*(x.detach() for x in results), *torch.autograd.grad(results, leaves, given))


def grid(tokens: int) -> Iterator[Case]:
    """All rows of the table."""
    combinations = itertools.product(grid_masks(tokens).items(), DTYPES, HEAD_DIMS, HEADS)
    return (Case(name, mask, dtype, dim, heads, tokens) for (name, mask), dtype, dim, heads in combinations)


def check(device: str, kernel: str, tokens: int) -> int:
    """Print the table; returns how many rows break the rule."""
    broken = 0
    widths = f"{'mask':<14} {'dtype':<9} {'D':>3} {'H/Hk':>5} "
    print(widths, *(f"{name:>17}" for name in RESULTS))
    for case in grid(tokens):
        ours, theirs = case.errors(device, kernel)
        bad = [name for name in RESULTS if not ours[name] <= 2 * theirs[name] + 1e-5]
        broken += bool(bad)
        cells = (f"{ours[name]:.1e} / {theirs[name]:.1e}" for name in RESULTS)
        heads, dtype = "/".join(map(str, case.heads)), str(case.dtype).removeprefix("torch.")
        verdict = f"  too far: {', '.join(bad)}" if bad else ""
        print(f"{case.name:<14} {dtype:<9} {case.head_dim:>3} {heads:>5} ", *(f"{x:>17}" for x in cells), verdict)
    return broken


def main() -> int:
    """Check this machine; exit code 1 if a row breaks the rule."""
    parser = argparse.ArgumentParser(prog="python -m ringflash.testing", description="check kernels against float64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", default="auto", choices=NAMES)
    parser.add_argument("--tokens", type=int, default=160, help="sequence length; at least 8")
    options = parser.parse_args()
    chosen = name_of(select(options.device, torch.bfloat16, HEAD_DIMS[0], kernel=options.kernel))
    print(f"Largest errors against float64, ringflash / torch {torch.__version__}, on {options.device} by {chosen}.")
    broken = check(options.device, options.kernel, max(8, options.tokens))
    print(f"{broken} rows are more than twice as far off as torch (+ 1e-5)." if broken else "All within the rule.")
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
