"""What Triton compiles a kernel for beside its constants: whether a stride is a multiple of 16, or 1.

A step of one token, one page or one request must look to it as any other does, or an engine compiles while it serves.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, get_type_hints

import pytest
import torch

from pageproof.optimized.interpreter import INTERPRETED
from pageproof.optimized.kernels.arguments import Numbers, Step, latent_kv, outputs, paged_kv, queries, strides
from pageproof.optimized.kernels.decode import decode
from pageproof.optimized.kernels.kv_update import kv_update
from pageproof.optimized.kernels.merge import merge_pair, merge_splits
from pageproof.optimized.kernels.plan import write_plan
from pageproof.optimized.kernels.prefill import prefill
from pageproof.optimized.kernels.sizes import Tile
from pageproof.optimized.shapes import Shape, attention_sizes, row_sizes
from pageproof.optimized.tile_table import Operands

ODD = 1_000_003  # what a dimension of size 1 may carry for a stride


def kinds(group: tuple[object, ...]) -> list[object]:
    """As Triton tells integers apart; tensors are told apart by their addresses, not by what they hold."""
    return ["tensor" if isinstance(each, torch.Tensor) else _kind(each) for each in _flat(group)]


def _flat(group: tuple[object, ...]) -> Iterator[object]:
    for each in group:
        if isinstance(each, tuple):
            yield from _flat(each)
        else:
            yield each


def _kind(number: object) -> object:
    if not isinstance(number, int):
        return number
    return 1 if number == 1 else ("int64" if number >= 2**31 else "int32", number % 16 == 0)


def with_odd_single(tensor: torch.Tensor) -> torch.Tensor:
    """The first row alone, whose stride says nothing."""
    return tensor[:1].as_strided(tensor[:1].shape, (ODD, *tensor.stride()[1:]))


@pytest.mark.parametrize("heads", [1, 3, 16])
def test_one_token_is_no_other_kind_of_step_than_two(heads: int) -> None:
    out, lse = torch.empty(2, heads, 48), torch.empty(2, heads)
    assert kinds(outputs(with_odd_single(out), with_odd_single(lse))) == kinds(outputs(out, lse))
    assert kinds(queries(with_odd_single(out))) == kinds(queries(out))
    assert kinds(queries(out[:1], out[:1, :, :16])) == kinds(queries(out, out[:, :, :16]))


def test_one_page_is_no_other_kind_of_pool_than_two() -> None:
    cache, latent = torch.empty(2, 3, 5, 48), torch.empty(2, 3, 48)
    single = with_odd_single(cache)
    assert kinds(paged_kv(single, single)) == kinds(paged_kv(cache, cache))
    assert kinds(latent_kv(with_odd_single(latent), 32)) == kinds(latent_kv(latent, 32))


def test_strides_that_are_stepped_over_are_the_tensors_own() -> None:
    sliced = torch.empty(4, 6, 8)[:, 1::2, :7]
    assert strides(sliced) == (48, 16, 1)
    assert strides(torch.empty(1, 1, 1).as_strided((1, 1, 1), (ODD,) * 3)) == (1, 1, 1)


def test_a_step_is_made_of_groups_alone() -> None:
    """Triton 3.6 forgets integers inside of a step's groups where a tensor lies among these: no strides then."""
    kinds_of_fields = get_type_hints(Step).values()
    assert all(issubclass(kind, tuple) and hasattr(kind, "_fields") for kind in kinds_of_fields)


def frozen() -> dict[str, Any]:
    attention_sizes.cache_clear()
    shape = Shape(2, 3, 64, 48, 16, torch.float16, "sm_90", Operands.COMPUTED, rope_size=16, rank=32)
    return {"attention": attention_sizes(shape, True), "rows": row_sizes(6, 48, 3), "tile": Tile(16, 64)}


@pytest.mark.parametrize("name", frozen())
def test_any_other_size_is_another_kernel(name: str) -> None:
    """Triton looks a kernel up by its compile-time arguments' hash and equality, and on disk by their text."""
    sizes, again = frozen()[name], frozen()[name]
    assert sizes == again
    assert hash(sizes) == hash(again)
    assert str(sizes) == str(again)
    for field in fields(sizes):
        found = getattr(sizes, field.name)
        other = replace(sizes, **{field.name: not found if isinstance(found, bool) else f"{found}0"})
        assert other != sizes, field.name
        assert str(other) != str(sizes), field.name


KERNELS = {
    prefill: Numbers._fields,
    decode: Numbers._fields,
    merge_splits: ("num_tokens",),
    merge_pair: ("num_rows",),
    kv_update: ("num_tokens",),
    write_plan: (
        "num_requests",
        "max_prefill_items",
        "max_decode_items",
        "max_merge_items",
        "request_programs",
        "programs",
    ),
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_numbers_of_a_launch_are_not_specialised(kernel: Any) -> None:
    """launching.launch does not look at their values. They are what stands between the groups and the constants."""
    names = [name for name in kernel.arg_names if not name.isupper()]
    assert names[-len(KERNELS[kernel]) :] == list(KERNELS[kernel])
    if INTERPRETED:
        assert list(kernel.kwargs["do_not_specialize"]) == list(KERNELS[kernel])
    else:
        assert [each.name for each in kernel.params if each.do_not_specialize] == list(KERNELS[kernel])


@pytest.mark.parametrize("kernel", [prefill, decode], ids=["prefill", "decode"])
def test_integers_of_a_step_are_arguments_in_the_order_of_their_group(kernel: Any) -> None:
    names = list(inspect.signature(kernel.fn).parameters)
    first = names.index(Numbers._fields[0])
    assert names[first : first + len(Numbers._fields)] == list(Numbers._fields)
