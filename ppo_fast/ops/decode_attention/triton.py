"""The Triton kernels of decode_attention, and their launcher.

Bytes moved: the keys and values that rows see, once. A program takes one head of keys and values
of a row, up to 16 of the query heads that read it (as the rows of its products), and at most CHUNK
columns. Chunks start at multiples of CHUNK, so that a row's bits do not depend on the batch. If a
row has one chunk, its program finishes the row. Otherwise each chunk stores its maximum, sum and
weighted values, and a second kernel combines the chunks.

Only the device reads lengths, so that a captured CUDA graph stays right when they change.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.triton_launch import Launch, interpreted, kernel, launch
from ppo_fast.ops.logprobs.triton import LOG2_E

# Columns of a chunk. Smaller chunks give a small batch more programs, but more partial results.
CHUNK = 512
# By the bytes of a number and the padded size of a head: a block of keys is 16 KB at most, and the
# next one is loaded while it is multiplied.
ATTEND = {
    (2, 16): Launch(128, 4, registers=128, num_stages=2),
    (2, 32): Launch(128, 4, registers=128, num_stages=2),
    (2, 64): Launch(128, 4, registers=128, num_stages=2),
    (2, 128): Launch(64, 4, registers=152, num_stages=3),
    (2, 256): Launch(32, 4, registers=184, num_stages=3),
    (4, 16): Launch(64, 4, registers=128, num_stages=2),
    (4, 32): Launch(64, 4, registers=128, num_stages=2),
    (4, 64): Launch(64, 4, registers=128, num_stages=2),
    (4, 128): Launch(32, 4, registers=128, num_stages=2),
    (4, 256): Launch(16, 8, registers=128, num_stages=2),
}
# By the padded size, where rows do not start on 16 bytes (no usual cache is so): every number is
# loaded alone, which takes registers.
UNALIGNED = {
    16: Launch(32, 4, registers=128),
    32: Launch(32, 4, registers=128),
    64: Launch(32, 4, registers=128),
    128: Launch(16, 8, registers=128),
    256: Launch(16, 8, registers=128),
}
COMBINE = Launch(16, 4, registers=96)  # chunks of a row at once

TILE = tl.constexpr(16)  # query heads of a program: the fewest that a product of tensor cores has


@triton.jit
def columns_of(lengths, row, num_columns, window, CHUNK: tl.constexpr):
    """The columns that a row sees, [first, end), and its first and last chunk; int32."""
    end = tl.minimum(tl.load(lengths + row), num_columns)
    first = tl.maximum(end - window, 0).to(tl.int32)
    end = end.to(tl.int32)
    return first, end, first // CHUNK, tl.maximum(end - 1, 0) // CHUNK


@kernel
def decode_attention_kernel(
    query,  # [n, H, d]
    keys,  # [n, L, K, d]
    values,  # [n, L, K, d]
    lengths,  # int64 [n]
    result,  # out, [n, H, d]
    partial,  # out, float32 [n, H, chunks, d]; empty where there is one chunk
    partial_stats,  # out, float32 [n, H, chunks, 2]: maximum in units of log 2, sum
    num_rows: tl.int64,
    num_columns: tl.int64,
    num_kv_heads: tl.int64,
    num_chunks: tl.int64,
    window: tl.int64,
    query_row: tl.int64,  # strides
    key_row: tl.int64,
    key_column: tl.int64,
    key_head: tl.int64,
    value_row: tl.int64,
    value_column: tl.int64,
    value_head: tl.int64,
    scaling: tl.float32,
    GROUP: tl.constexpr,  # H / K
    HEAD_SIZE: tl.constexpr,
    SIZE: tl.constexpr,  # the power of two at or above it
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,  # the strides are multiples of VEC, and tensors start on 16 bytes
    VEC: tl.constexpr,
    WIDE: tl.constexpr,  # products of float32: the interpreter has none of bfloat16
    BLOCK: tl.constexpr,
):
    """One program a chunk, row, head of keys and values, and 16 of the query heads that read it.
    The chunks that most rows have come first."""
    TILES: tl.constexpr = (GROUP + TILE - 1) // TILE
    tile = tl.program_id(0) % TILES
    place = tl.program_id(0) // TILES
    kv_heads, rows = num_kv_heads.to(tl.int32), num_rows.to(tl.int32)
    head = place % kv_heads
    row = (place // kv_heads) % rows
    chunk = place // kv_heads // rows
    head, row = head.to(tl.int64), row.to(tl.int64)
    first, end, first_chunk, last_chunk = columns_of(lengths, row, num_columns, window, CHUNK)
    if (chunk < first_chunk) | (chunk > last_chunk):
        return
    first = tl.maximum(first, chunk * CHUNK)
    end = tl.minimum(end, (chunk + 1) * CHUNK)

    if ALIGNED:
        query_row = query_row // VEC * VEC
        key_row, key_column, key_head = (
            key_row // VEC * VEC,
            key_column // VEC * VEC,
            key_head // VEC * VEC,
        )
        value_row, value_column, value_head = (
            value_row // VEC * VEC,
            value_column // VEC * VEC,
            value_head // VEC * VEC,
        )
    member = tile * TILE + tl.arange(0, TILE)
    heads = head * GROUP + member
    lane = tl.arange(0, SIZE)
    column = tl.arange(0, BLOCK)
    is_query = (member < GROUP)[:, None] & (lane < HEAD_SIZE)[None, :]
    q_at = row * query_row + heads[:, None] * HEAD_SIZE + lane[None, :]
    q = tl.load(query + q_at, mask=is_query, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    keys += row * key_row + head * key_head
    values += row * value_row + head * value_head
    key_at = column.to(tl.int64)[:, None] * key_column + lane[None, :]
    value_at = column.to(tl.int64)[:, None] * value_column + lane[None, :]
    scale = scaling * LOG2_E

    key_column, value_column = key_column.to(tl.int64), value_column.to(tl.int64)
    maximum = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    weighted = tl.zeros([TILE, SIZE], tl.float32)
    for start in range(first, end, BLOCK):
        inside = column < end - start
        seen = inside[:, None] & (lane < HEAD_SIZE)[None, :]
        k = tl.load(keys + start * key_column + key_at, mask=seen, other=0.0)
        if WIDE:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shares = tl.exp2(scores - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        v = tl.load(values + start * value_column + value_at, mask=seen, other=0.0)
        if WIDE:
            v = v.to(tl.float32)
        total = total * shrink + tl.sum(shares, 1)
        weighted *= shrink[:, None]
        weighted = tl.dot(shares.to(v.dtype), v, weighted, input_precision="ieee")
        maximum = new_maximum

    number = row * (num_kv_heads * GROUP) + heads
    if first_chunk == last_chunk:
        mean = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
        result_at = number[:, None] * HEAD_SIZE + lane[None, :]
        tl.store(result + result_at, mean.to(result.dtype.element_ty), mask=is_query)
    else:
        number = number * num_chunks + chunk
        partial_at = number[:, None] * HEAD_SIZE + lane[None, :]
        tl.store(partial + partial_at, weighted, mask=is_query)
        tl.store(partial_stats + 2 * number, maximum, mask=member < GROUP)
        tl.store(partial_stats + 2 * number + 1, total, mask=member < GROUP)


@kernel
def combine_chunks_kernel(
    partial,  # float32 [n, H, chunks, d]
    partial_stats,  # float32 [n, H, chunks, 2]
    lengths,  # int64 [n]
    result,  # out, [n, H, d]
    num_columns: tl.int64,
    num_heads: tl.int64,
    num_chunks: tl.int64,
    window: tl.int64,
    HEAD_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and query head."""
    head = tl.program_id(0)
    row = (head // num_heads.to(tl.int32)).to(tl.int64)
    head = head.to(tl.int64)
    _, _, first_chunk, last_chunk = columns_of(lengths, row, num_columns, window, CHUNK)
    if first_chunk == last_chunk:
        return
    lane = tl.arange(0, SIZE)
    maximum = float("-inf")
    total = 0.0
    weighted = tl.zeros([SIZE], tl.float32)
    for start in range(first_chunk, last_chunk + 1, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        inside = chunk <= last_chunk
        at = head * num_chunks + chunk
        chunk_maximum = tl.load(partial_stats + 2 * at, mask=inside, other=float("-inf"))
        chunk_total = tl.load(partial_stats + 2 * at + 1, mask=inside, other=0.0)
        inside = inside[:, None] & (lane < HEAD_SIZE)[None, :]
        part = tl.load(partial + at[:, None] * HEAD_SIZE + lane[None, :], mask=inside, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(chunk_maximum, 0))
        factor = tl.exp2(chunk_maximum - new_maximum)
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(chunk_total * factor, 0)
        weighted = weighted * shrink + tl.sum(part * factor[:, None], 0)
        maximum = new_maximum
    mean = weighted / total
    at = head * HEAD_SIZE + lane
    tl.store(result + at, mean.to(result.dtype.element_ty), mask=lane < HEAD_SIZE)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Compute the same as reference.decode_attention on a GPU, in float32, bfloat16 or float16."""
    num_rows, num_heads, head_size = query.shape
    num_columns, num_kv_heads = keys.shape[1:3]
    device, group = query.device, num_heads // num_kv_heads
    num_chunks = max(triton.cdiv(num_columns, CHUNK), 1)
    result = torch.empty(query.shape, dtype=query.dtype, device=device)
    kept = (num_rows, num_heads, num_chunks) if num_chunks > 1 else (0,)
    partial = torch.empty((*kept, head_size), dtype=torch.float32, device=device)
    partial_stats = torch.empty((*kept, 2), dtype=torch.float32, device=device)
    lengths = lengths.contiguous()
    vec = 16 // query.element_size()
    if not query[:1].is_contiguous() or query.stride(0) % vec:
        query = query.contiguous()
    query_row = query.stride(0) if num_rows > 1 else 0
    key_strides, value_strides = _strides(keys), _strides(values)
    strides = (query_row, *key_strides, *value_strides)
    starts = (x.data_ptr() % 16 for x in (query, keys, values))
    is_aligned = not any(starts) and all(stride % vec == 0 for stride in strides)
    size = max(16, triton.next_power_of_2(head_size))
    seen = num_columns if window is None else window
    common = {"HEAD_SIZE": head_size, "SIZE": size, "CHUNK": CHUNK}
    launch(
        decode_attention_kernel,
        num_chunks * num_rows * num_kv_heads * triton.cdiv(group, TILE.value),
        ATTEND[query.element_size(), size] if is_aligned else UNALIGNED[size],
        device,
        query,
        keys,
        values,
        lengths,
        result,
        partial,
        partial_stats,
        num_rows,
        num_columns,
        num_kv_heads,
        num_chunks,
        seen,
        *strides,
        scaling,
        GROUP=group,
        ALIGNED=is_aligned,
        VEC=vec,
        WIDE=interpreted(),
        **common,
    )
    if num_chunks > 1:
        launch(
            combine_chunks_kernel,
            num_rows * num_heads,
            COMBINE,
            device,
            partial,
            partial_stats,
            lengths,
            result,
            num_columns,
            num_heads,
            num_chunks,
            seen,
            **common,
        )
    return result


def _strides(x: Tensor) -> list[int]:
    """Return the strides of rows, columns and heads; 0 where the size is 1 (any stride will do)."""
    strides = zip(x.shape[:3], x.stride()[:3], strict=True)
    return [stride if size > 1 else 0 for size, stride in strides]
