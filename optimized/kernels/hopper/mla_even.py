"""The warp group of the even tiles of keys: it sums columns 0..255 of the output, over the tiles of both.

A step is two tiles of keys. Each warp group scores its own tile; the running maximum goes from the even one to the odd
one and back, and each gives its weights to the other, which multiplies its half of the columns with them. While one
is busy with its softmax, the products of the other fill the tensor cores.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..tiles import finite_maximum
from .mla_groups import Running
from .mla_layouts import HALF, KEYS, OUTPUT, ROWS, SCORES
from .mla_products import (
    as_operand,
    begin_scores,
    end_scores,
    finished_state,
    join_totals,
    load_rope,
    release,
    shaped,
    spread,
    store_half,
    whole,
)
from .mla_work import find_work, has_rows, num_works


@gluon.jit
def begin_even(q_rope, shared, key, phase, work, zero):
    mbarrier.wait(shared.even.on_left.full, phase)
    return begin_scores(shared.q.left, q_rope, shared.even.left, shared.even.rope, key, work, zero)


@gluon.jit
def even_step(running, i, phase, q_rope, shared, work, job, LAST: gl.constexpr, SIZES: gl.constexpr):
    """Step `i` of the work, and the first products of the next."""
    even, odd, mine, other = shared.even, shared.odd, shared.from_even, shared.from_odd
    zero = phase & job.numbers.bias_width
    key = work.first_key + i * (2 * KEYS)
    mbarrier.wait(even.on_right.full, phase)
    scores = end_scores(running.scores, shared.q.right, even.right, key, work, zero)
    scores = shaped(scores, key, work, job, SIZES)
    mid = gl.maximum(running.maximum, gl.max(scores, 1))
    mine.maximum.store(mid)
    release(mine.maximum_ready)
    if LAST:
        mbarrier.arrive(shared.q.barriers.empty, count=1)
    stand_in = finite_maximum(mid)
    weights = gl.exp2(scores - stand_in[:, None])
    rescale = gl.exp2(running.maximum - stand_in)
    total = running.total * rescale + gl.sum(weights, 1)
    operand = as_operand(weights, mine.weights)
    weighted = running.weighted * spread(rescale)
    weighted = warpgroup_mma(operand, whole(even.left, HALF, zero), weighted, is_async=True)
    # The odd tile's maximum and weights.
    mbarrier.wait(other.weights_ready, phase)
    maximum = other.maximum.load(gl.SliceLayout(1, SCORES))
    rescale = gl.exp2(mid - finite_maximum(maximum))
    total = total * rescale
    mine.weights.store((weights * rescale[:, None]).to(mine.weights.dtype))
    fence_async_shared()
    release(mine.weights_ready)
    weighted, operand = warpgroup_mma_wait(0, [weighted, operand])
    release(even.on_left.empty)
    weighted = weighted * spread(rescale)
    mbarrier.wait(odd.on_left.full, phase)
    weighted = warpgroup_mma(whole(other.weights, KEYS, zero), whole(odd.left, HALF, zero), weighted, is_async=True)
    if LAST:
        weighted = warpgroup_mma_wait(0, [weighted])
    else:
        scores = begin_even(q_rope, shared, key + 2 * KEYS, phase ^ 1, work, zero)
        weighted = warpgroup_mma_wait(2, [weighted])
    release(odd.on_left.empty)
    return Running(scores, weighted, maximum, total)


@gluon.jit
def even_work(steps, works, shared, work, job, SIZES: gl.constexpr):
    """(values [64, 256], maximum, total) of a work's rows over its keys."""
    weighted = gl.zeros([ROWS, HALF], gl.float32, OUTPUT)
    maximum = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    if work.num_steps > 0:
        zero = job.numbers.bias_width
        q_rope = load_rope(work, job.step.queries, SIZES)
        mbarrier.wait(shared.q.barriers.full, works & 1)
        scores = begin_even(q_rope, shared, work.first_key, steps & 1, work, zero)
        running = Running(scores, weighted, maximum, total)
        last = work.num_steps - 1
        for i in range(last):
            running = even_step(running, i, (steps + i) & 1, q_rope, shared, work, job, False, SIZES)
        running = even_step(running, last, (steps + last) & 1, q_rope, shared, work, job, True, SIZES)
        weighted = running.weighted
        maximum = running.maximum
        total = join_totals(running, shared.from_even, shared.from_odd, works)
    return weighted, maximum, total


@gluon.jit
def attend_even(shared, job, BOX: gl.constexpr, SIZES: gl.constexpr, PREFILL: gl.constexpr):
    steps = 0
    works = 0
    for index in range(gl.program_id(0), num_works(job, SIZES, PREFILL), gl.num_programs(0)):
        work = find_work(job, index, BOX, SIZES, PREFILL)
        if has_rows(work, SIZES):
            weighted, maximum, total = even_work(steps, works, shared, work, job, SIZES)
            store_half(finished_state(weighted, maximum, total), work, job, shared.from_even.weights, 0, SIZES)
            steps += work.num_steps
            works += gl.minimum(work.num_steps, 1)
