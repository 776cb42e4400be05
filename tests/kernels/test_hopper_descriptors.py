"""Tensors as the tensor memory engine of Hopper takes them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringflash.kernels.hopper.descriptors import addressable, block_layout, boxable, descriptor, made_addressable


@pytest.mark.parametrize(
    ("strides", "copied"),
    [
        ((5 * 64, 64, 1), False),
        ((64, 640, 1), False),
        ((64, 0, 1), False),
        ((64, 2**29, 1), True),
        ((5 * 60, 60, 1), True),
        ((0, 64, 1), True),
        ((5 * 64, 1, 5), True),
    ],
    ids=[
        "contiguous",
        "heads outermost",
        "one head for all",
        "heads over 2^31 elements",
        "head not of whole 16 bytes",
        "one row for all",
        "strided columns",
    ],
)
def test_tensors_out_of_the_engines_reach_are_copied(strides: tuple[int, int, int], copied: bool) -> None:
    x = torch.empty_strided((10, 5, 64), strides, dtype=torch.bfloat16, device="meta")
    assert (addressable(x) is not x) == copied
    assert addressable(addressable(x)).shape == x.shape


@pytest.mark.parametrize("made", [addressable, boxable])
def test_copies_are_made_of_what_the_engine_cannot_take_in_each_call(made: Callable[[Tensor], Tensor]) -> None:
    """Others are taken as they are."""
    whole, odd = torch.rand(8, 2, 64), torch.rand(8, 2, 65)[..., 1:]
    first, taken_again = made_addressable((whole, odd), made)
    again = torch.rand(8, 2, 64), torch.rand(8, 2, 65)[..., 1:]
    for given, taken in (((whole, odd), first), (again, taken_again(again))):
        assert taken[0] is given[0]
        assert taken[1].is_contiguous()
        assert torch.equal(taken[1], given[1])
    assert made_addressable((whole,), made)[1](again[:1])[0] is again[0]


def test_a_dimension_of_heads_without_a_stride_is_copied_for_boxes_alone() -> None:
    same = torch.rand(8, 1, 64).expand(8, 4, 64)
    assert addressable(same) is same
    assert boxable(same).is_contiguous()
    assert torch.equal(boxable(same), same)


def test_descriptors_of_one_form_differ_in_their_tensor_only() -> None:
    tensors = [torch.empty(10, 5, 64, dtype=torch.bfloat16) for _ in range(2)]
    first, second = (descriptor(x, 64, 64) for x in tensors)
    layout = block_layout(64, 64, torch.bfloat16)
    checked = TensorDescriptor(tensors[1], [10, 5 * 64], [5 * 64, 1], [64, 64], layout)
    assert first.base is tensors[0]
    assert second.base is tensors[1]
    assert vars(first) | {"base": None} == vars(second) | {"base": None} == vars(checked) | {"base": None}
    assert descriptor(tensors[0], 32, 64).block_shape == [32, 64]
