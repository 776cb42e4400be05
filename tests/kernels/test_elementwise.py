"""SwiGLU's product and rotary embedding in Triton: in its interpreter against float64, and compiled for every chip.

As in test_triton_interpreter.py, tests of the interpreter run in a pytest of their own that the ordinary run starts.
"""

from __future__ import annotations

import pytest
import torch
import triton
from aot import SHARED_LIMIT, catch, compile_for
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import assert_passes_in_interpreter

from ringflash.kernels.gpu import elementwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

if not triton.knobs.runtime.interpret:

    def test_elementwise_kernels_pass_their_tests_in_the_interpreter() -> None:
        assert_passes_in_interpreter(__file__)

    @pytest.mark.parametrize("target", SHARED_LIMIT)
    @pytest.mark.parametrize("kernel", ["silu_product", "silu_product_backward", "rotate"])
    def test_elementwise_kernels_compile_without_spills(kernel: str, target: str) -> None:
        x = torch.empty(512, 8, 128, dtype=torch.bfloat16)
        angles = torch.empty(512, 64)
        operands = {"silu_product": (x, x), "silu_product_backward": (x, x, x), "rotate": (x, angles, angles)}[kernel]
        call = catch(elementwise, f"{kernel}_kernel", lambda: getattr(elementwise, kernel)(*operands))
        assert compile_for(target, call).spilled == 0

    def test_tensors_of_a_cpu_are_left_to_torch() -> None:
        assert not elementwise.supports(torch.ones(1))

else:

    def close(found: torch.Tensor, exact: torch.Tensor) -> None:
        """Rounded once from something computed in fp32; the interpreter rounds to bf16 towards zero."""
        within = torch.finfo(found.dtype).eps * exact.abs() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert ((found.double() - exact).abs() <= within.clamp(min=torch.finfo(found.dtype).tiny)).all()

    @settings(max_examples=30)
    @given(count=st.integers(1, 5000), dtype=st.sampled_from(DTYPES))
    def test_swiglus_product_and_its_gradients_are_rounded_once(count: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(count)
        gate, up, dout = (torch.randn(count, generator=generator).mul_(3).to(dtype) for _ in range(3))
        exact = [x.double().requires_grad_() for x in (gate, up)]
        product = torch.nn.functional.silu(exact[0]) * exact[1]
        gradients = torch.autograd.grad(product, exact, dout.double())
        close(elementwise.silu_product(gate, up), product.detach())
        found = elementwise.silu_product_backward(gate, up, dout)
        for x, other in zip(found, (product.detach(), *gradients), strict=True):
            close(x, other)

    @settings(max_examples=30)
    @given(rows=st.integers(1, 50), heads=st.integers(1, 5), half=st.integers(1, 80), dtype=st.sampled_from(DTYPES))
    def test_rotations_are_rounded_once_and_turn_back(rows: int, heads: int, half: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, heads, 2 * half, generator=generator).to(dtype)
        angle = torch.randn(rows, half, generator=generator)
        cos, sin = angle.cos(), angle.sin()
        for sign in (1.0, -1.0):
            first, second = x.double().chunk(2, -1)
            c, s = cos.double()[:, None], sign * sin.double()[:, None]
            exact = torch.cat((first * c - second * s, second * c + first * s), -1)
            close(elementwise.rotate(x, cos, sin, sign), exact)
