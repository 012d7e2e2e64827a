"""What a group of adapted layers over one input is multiplied with, made at once: a launch takes a host longer than
such work a GPU.

`weights` decodes up to three 4-bit weights side by side; `adapters` puts their A's below each other and their B's on a
block diagonal, so that each is one matrix.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.config.formats import bits_of, constants_of
from halfbyte.kernels.device_tables import device_tables
from halfbyte.kernels.group import Member
from halfbyte.kernels.triton.codec import RUN, RUNS_PER_PROGRAM, decode_part
from halfbyte.kernels.triton.decode import LEAST_BLOCKSIZE, on_device_of, parts_of

MOST_MEMBERS = 3
"""q, k and v."""
ELEMENTS = 1024
"""Of the adapters' matrices that a program writes."""


@triton.jit(do_not_specialize=["parts0", "parts1"])
def weights_kernel(
    codes0, absmax0, nested0, offset0, count0, parts0, codes1, absmax1, nested1, offset1, count1, parts1,
    codes2, absmax2, nested2, offset2, count2, codebook, dynamic_map, out,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """`codec.dequantize_kernel` of each weight, the results one behind the other in `out`."""
    part = tl.program_id(0)
    if part < parts0:
        decode_part(codes0, absmax0, nested0, codebook, dynamic_map, offset0, out, count0, (count0 + 1) // 2, part,
                    BLOCKSIZE, NESTED, OFFSETS, RUNS)  # fmt: skip
    elif part < parts0 + parts1:
        decode_part(codes1, absmax1, nested1, codebook, dynamic_map, offset1, out + count0, count1, (count1 + 1) // 2,
                    part - parts0, BLOCKSIZE, NESTED, OFFSETS, RUNS)  # fmt: skip
    else:
        decode_part(codes2, absmax2, nested2, codebook, dynamic_map, offset2, out + count0 + count1, count2,
                    (count2 + 1) // 2, part - parts0 - parts1, BLOCKSIZE, NESTED, OFFSETS, RUNS)  # fmt: skip


@triton.jit
def block_of(matrix, row, column, rows, columns, scaling):
    """scaling * matrix (rows, columns) where `row` and `column` lie in it, else 0."""
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return scaling * tl.load(matrix + row * columns + column, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2", "out0", "out1", "out2"])
def adapters_kernel(
    a0, b0, scaling0, rank0, out0, a1, b1, scaling1, rank1, out1, a2, b2, scaling2, rank2, out2, a, b, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """a (ranks, columns), then b (all out, ranks): three matrices, of which those of rank 0 are none."""
    ranks = rank0 + rank1 + rank2
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_a = ranks * columns
    row, column = at // columns, at % columns
    value = block_of(a0, row, column, rank0, columns, 1.0) + block_of(a1, row - rank0, column, rank1, columns, 1.0)
    value += block_of(a2, row - rank0 - rank1, column, rank2, columns, 1.0)
    tl.store(a + at, value.to(a.dtype.element_ty), mask=at < of_a)
    at -= of_a
    row, column = at // ranks, at % ranks
    value = block_of(b0, row, column, out0, rank0, scaling0)
    value += block_of(b1, row - out0, column - rank0, out1, rank1, scaling1)
    value += block_of(b2, row - out0 - out1, column - rank0 - rank1, out2, rank2, scaling2)
    tl.store(b + at, value.to(b.dtype.element_ty), mask=(at >= 0) & (at < (out0 + out1 + out2) * ranks))


def knows(members: Sequence[Member], columns: int) -> bool:
    """Is this group a case for these kernels: few members, all double-quantized or none, blocks of a power of two?"""
    quant_type, blocksize = members[0].weight[4:]
    nested = {member.weight[2] is None for member in members}
    return bits_of(quant_type) == 4 and len(members) <= MOST_MEMBERS and len(nested) == 1 and columns > 0 and (
        blocksize >= LEAST_BLOCKSIZE and blocksize & (blocksize - 1) == 0
    )  # fmt: skip


def aligned(members: Sequence[Member]) -> bool:
    """Whether all codes and scales begin at multiples of 16 bytes, as torch's tensors do but streamed ones do not.

    Triton compiles a kernel anew for each combination, of which six pointers have many.
    """
    return all(tensor.data_ptr() % 16 == 0 for m in members for tensor in m.weight[:2])


def weights(members: Sequence[Member], columns: int, dtype: torch.dtype) -> Tensor:
    """(all out_features, columns): the members' weights decoded, below each other."""
    codes = members[0].weight[0]
    out = torch.empty(sum(m.out_features for m in members), columns, dtype=dtype, device=codes.device)
    table, dynamic = device_tables(*members[0].weight[4:], codes.device)
    arguments: list[Tensor | float] = []
    parts = 0
    for number in range(MOST_MEMBERS):
        given = members[number] if number < len(members) else None
        codes, absmax, nested, offset, _, _ = (given or members[0]).weight
        count = given.out_features * columns if given else 0
        own = parts_of(count, RUNS_PER_PROGRAM * RUN.value)
        arguments += [codes.contiguous(), absmax.contiguous(), absmax if nested is None else nested.contiguous(),
                      offset, count]  # fmt: skip
        arguments += [own] if number < MOST_MEMBERS - 1 else []
        parts += own
    if parts:
        with on_device_of(out):
            weights_kernel[(parts,)](
                *arguments, table.values, dynamic, out, BLOCKSIZE=members[0].weight[5],
                NESTED=members[0].weight[2] is not None, OFFSETS=constants_of(members[0].weight[4]) > 1,
                RUNS=RUNS_PER_PROGRAM, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def adapters(members: Sequence[Member], columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a (all ranks, columns), and b (all out_features, all ranks) with the members' scaled B's on its diagonal."""
    like = members[0].weight[0]
    ranks, rows = sum(m.rank for m in members), sum(m.out_features for m in members)
    a = torch.empty(ranks, columns, dtype=dtype, device=like.device)
    b = torch.empty(rows, ranks, dtype=dtype, device=like.device)
    arguments: list[Tensor | float] = []
    for number in range(MOST_MEMBERS):
        given = members[number] if number < len(members) else None
        if given is None or given.lora_A is None or given.lora_B is None:
            arguments += [a, b, 0.0, 0, given.out_features if given else 0]
        else:
            arguments += [given.lora_A.contiguous(), given.lora_B.contiguous(), given.scaling, given.rank,
                          given.out_features]  # fmt: skip
    if ranks:
        with on_device_of(a):
            adapters_kernel[(parts_of(ranks * (columns + rows), ELEMENTS),)](
                *arguments, a, b, columns, BLOCK=ELEMENTS, num_warps=4
            )
    return a, b
