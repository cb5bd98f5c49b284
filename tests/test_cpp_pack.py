"""The C++ operators that pack, against a stable sort and against the layouts' own torch code.

Under a dispatch mode, which has to see every operator, layouts do not use the C++ ones.
"""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sten
from sten.backends import cpp
from sten.layouts import BSR, CSR, NM, FanIn, GroupedNM, VectorNM
from sten.layouts.checks import covering
from sten.layouts.topk import block_sums, top, top_of_groups

if not cpp.available():
    pytest.skip("the extension sten._C is not built", allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NMS = [NM(2, 4), NM(1, 2), NM(3, 7), NM(2, 8), NM(5, 16), NM(1, 16), NM(16, 32), NM(9, 64), NM(4, 4)]
GROUPED = [GroupedNM(2, 4, 8), GroupedNM(1, 10, 8), GroupedNM(1, 4, 3), GroupedNM(3, 7, 1), GroupedNM(2, 2, 5)]
GROUPED += [GroupedNM(4, 8, 4), GroupedNM(15, 16, 2)]
SHAPES = [(64, 520), (37, 101), (3, 7), (1, 1), (20, 6, 3, 3)]


class Seen(TorchDispatchMode):
    """Calls every operator as it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def in_torch(function, *args):
    with Seen():
        return function(*args)


def hostile_score(shape, dtype):
    """Ties, both zeros, infinities and NaN among normal numbers."""
    score = torch.randn(shape).mul(4).round().div(4).to(dtype)
    kind = torch.randint(0, 40, shape)
    for number, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0)):
        score[kind == number] = value
    return score


def highest(score, count):
    """The mask of the `count` highest along the last dimension, by a stable sort."""
    plain = score.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    order = plain.sort(dim=-1, descending=True, stable=True).indices[..., : max(count, 0)]
    return torch.zeros(score.shape, dtype=torch.bool).scatter_(-1, order, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 63, 64, 1000, 70001])
def test_top_is_a_stable_sort(size, dtype):
    torch.manual_seed(size)
    score = hostile_score((size,), dtype)
    for count in {0, 1, size // 10, size // 2, size - 1, size, size + 3}:
        assert torch.equal(top(score, count), highest(score, count)), count
    score = torch.randn(size).to(dtype)
    assert torch.equal(top(score, size // 3), highest(score, size // 3))
    assert torch.equal(top(torch.zeros(size, dtype=dtype), size // 2), torch.arange(size) < size // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 8, 16, 32, 33, 64, 65, 300, 2500])
def test_top_of_groups_is_a_stable_sort(m, dtype):
    torch.manual_seed(m)
    score = hostile_score((5, 13, m), dtype)
    for n in {0, 1, m // 2, m - 1, m}:
        assert torch.equal(top_of_groups(score, n), highest(score, n)), n
    assert torch.equal(top_of_groups(score.transpose(0, 1), 1), highest(score.transpose(0, 1), 1))
    assert top_of_groups(score[:0], 1).shape == (0, 13, m)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
def test_block_sums_are_those_of_torch(dtype):
    """Blocks that end with the matrix, are larger than it, or wider than what is summed at a time."""
    torch.manual_seed(0)
    for shape in ((37, 101), (1, 1), (3, 3000)):
        matrix = torch.rand(shape).gt(0.5) if dtype is torch.bool else torch.randn(shape).to(dtype)
        for height, width in ((1, 1), (4, 7), (16, 16), (1, 101), (50, 1500)):
            sums = block_sums(matrix, (height, width))
            pads = (0, -shape[1] % width, 0, -shape[0] % height)
            padded = torch.nn.functional.pad(matrix.double(), pads)
            whole = padded.view(padded.shape[0] // height, height, -1, width).sum((1, 3))
            torch.testing.assert_close(sums, whole, rtol=0, atol=1e-11)
    assert torch.equal(block_sums(matrix.t(), (2, 3)), block_sums(matrix.t().contiguous(), (2, 3)))
    assert in_torch(block_sums, matrix, (2, 2)) is None
    with pytest.raises(RuntimeError, match="at least 1"):
        block_sums(matrix, (0, 3))


@pytest.mark.parametrize("layout", [BSR((4, 4)), BSR((3, 50)), FanIn()], ids=str)
def test_covering_is_what_is_stored(layout):
    """Masks that a layout holds, that cut through its units, and without entries."""
    torch.manual_seed(0)
    for shape in ((37, 101), (6, 5, 3, 3)):
        score, half = torch.randn(shape), torch.rand(shape) > 0.5
        for mask in (
            layout.mask(score, 0.5),
            half,
            half.flatten(1)[:, :1].view(-1, *[1] * (len(shape) - 1)) & half,
            half & False,
        ):
            stored = layout.support(layout.pack(score, mask), shape)
            assert torch.equal(covering(layout, mask), stored) and torch.equal(in_torch(covering, layout, mask), stored)
        with pytest.raises(ValueError, match="bool"):
            covering(layout, half.float())


@pytest.mark.parametrize("layout", NMS, ids=str)
def test_nm_packs_and_unpacks_as_torch_code_does(instruction_set, layout):
    torch.manual_seed(0)
    for shape in SHAPES:
        full = layout.mask(torch.randn(shape))
        for dtype in DTYPES:
            dense = torch.randn(shape).to(dtype)
            dense.view(-1)[0] = torch.inf
            for mask in (full, full & (torch.rand(shape) < 0.7), torch.zeros_like(full)):
                same_parts(layout, dense, mask)


@pytest.mark.parametrize("layout", GROUPED, ids=str)
def test_grouped_nm_packs_and_unpacks_as_torch_code_does(layout):
    torch.manual_seed(0)
    for shape in SHAPES:
        full = layout.mask(torch.randn(shape))
        for dtype in DTYPES:
            dense = torch.randn(shape).to(dtype)
            dense.view(-1)[0] = -torch.inf
            for mask in (full, full & (torch.rand(shape) < 0.9)) if dtype is torch.float32 else (full,):
                same_parts(layout, dense, mask)


def same_parts(layout, dense, mask):
    parts, want = layout.pack(dense, mask), in_torch(layout.pack, dense, mask)
    for name in want:
        assert parts[name].dtype == want[name].dtype and torch.equal(parts[name], want[name]), name
    again = layout.unpack(parts, dense.shape)
    assert again.dtype == dense.dtype and torch.equal(again, dense.masked_fill(~mask, 0))
    assert torch.equal(again, in_torch(layout.unpack, want, dense.shape))
    values = layout.pack_like(dense, parts)
    assert values.dtype == dense.dtype and torch.equal(values, in_torch(layout.pack_like, dense, parts))
    for numbers in (torch.arange(values.numel()).view(values.shape), torch.ones_like(values, dtype=torch.bool)):
        other = {**parts, "values": numbers}
        assert torch.equal(layout.unpack(other, dense.shape), in_torch(layout.unpack, other, dense.shape))


@pytest.mark.parametrize("layout", GROUPED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grouped_nm_chooses_as_well_as_torch_code_does(instruction_set, layout, shape):
    for score in (torch.rand(shape), torch.randn(shape), torch.zeros(shape), torch.rand(shape, dtype=torch.float64)):
        mask, other = layout.mask(score), in_torch(layout.mask, score)
        layout.pack(score, mask)  # or it says what is wrong
        got, want = (float((score.double() * m).sum()) for m in (mask, other))
        assert got >= want - 0.003 * float(score.abs().sum())
        assert torch.equal(mask, layout.mask(score))
    hostile = hostile_score(shape, torch.float32)
    mask, other = layout.mask(hostile), in_torch(layout.mask, hostile)
    layout.pack(torch.ones(shape), mask)
    assert int(hostile[mask].isnan().sum()) <= int(hostile[other].isnan().sum()) + mask.numel() // 200
    tiny = torch.rand(shape)
    assert torch.equal(layout.mask(tiny), layout.mask(tiny * 2.0**-120))  # only the order counts


@pytest.mark.parametrize("layout", [NM(2, 4), NM(2, 8), GroupedNM(2, 4, 2), GroupedNM(1, 3, 2)], ids=str)
def test_wrong_masks_are_refused_with_the_same_words(layout):
    torch.manual_seed(0)
    shape = (22, 50)
    good = layout.mask(torch.rand(shape))
    crowded, uneven = good.clone(), good.clone()
    crowded[5:11, 17:30] = True
    uneven[:, 1:] = good[:, :1]
    for mask in (crowded, uneven) if isinstance(layout, GroupedNM) else (crowded,):
        with pytest.raises(ValueError) as got:
            layout.pack(torch.ones(shape), mask)
        with pytest.raises(ValueError) as want:
            in_torch(layout.pack, torch.ones(shape), mask)
        assert str(got.value) == str(want.value)


def test_edited_index_reads_nothing_out_of_bounds():
    layout = GroupedNM(2, 4, 8)
    dense = torch.randn(64, 520)
    parts = layout.pack(dense, layout.mask(dense))
    for wrong in (-1, layout.width, 2**15 - 1):
        parts["index"][0, 1, 2, 3] = wrong
        for call in (lambda: layout.unpack(parts, (64, 520)), lambda: layout.pack_like(dense, parts)):
            with pytest.raises(IndexError, match="Expected index from 0 to 47"):
                call()


def test_any_byte_but_zero_is_true():
    bytes_ = torch.randint(0, 256, (32, 48), dtype=torch.uint8) * (torch.rand(32, 48) < 0.1)
    dense, odd = torch.randn(32, 48), bytes_.view(torch.bool)
    values, _, col = torch.ops.sten.compress_masked(dense, odd)
    assert torch.equal(values, dense[bytes_ != 0]) and torch.equal(col.long(), (bytes_ != 0).nonzero()[:, 1])
    for byte in (2, 128, 255):
        mask = GroupedNM(2, 4, 2).mask(dense)
        index, unsolved = torch.ops.sten.grouped_nm_index((mask.byte() * byte).view(torch.bool), 2, 4, 2)
        assert not unsolved.any() and torch.equal(index, GroupedNM(2, 4, 2).pack(dense, mask)["index"])


def test_no_rows():
    for layout in (NM(2, 4), NM(16, 32)):
        parts = layout.pack(torch.ones(4, 64), layout.mask(torch.ones(4, 64)))
        assert layout.unpack({name: part[:0] for name, part in parts.items()}, (0, 64)).shape == (0, 64)


@pytest.mark.parametrize("layout", [NM(16, 32), NM(2, 4), GroupedNM(2, 4, 2)], ids=str)
def test_gradients_and_transforms_still_pass(layout):
    shape = (8, 64)
    mask = layout.mask(torch.rand(shape))
    parts = layout.pack(torch.randn(shape), mask)
    values = parts["values"].clone().requires_grad_()
    layout.unpack({**parts, "values": values}, shape).backward(weight := torch.randn(shape))
    assert torch.equal(values.grad, layout.pack_like(weight, parts))
    tripled = torch.stack([parts["values"], 2 * parts["values"], -parts["values"]])
    got = torch.func.vmap(lambda v: layout.unpack({**parts, "values": v}, shape))(tripled)
    assert torch.equal(got[1], 2 * got[0]) and torch.equal(got[0], layout.unpack(parts, shape))
    turned = torch.randn(64, 8).t()  # not contiguous
    assert torch.equal(layout.pack_like(turned, parts), layout.pack_like(turned.contiguous(), parts))


@pytest.mark.parametrize("layout", [CSR(), FanIn(), BSR((4, 4)), VectorNM(2, 4, 8), *GROUPED[:2], *NMS[:2]], ids=str)
def test_sparsify_with_the_extension_is_sparsify_without_it(layout):
    torch.manual_seed(0)
    weight, sparsity = torch.randn(48, 130), None if layout.rate else 0.7
    mask = layout.mask(weight.abs(), sparsity)
    if not isinstance(layout, GroupedNM):  # whose choice may differ among nearly equal ones
        assert torch.equal(mask, in_torch(layout.mask, weight.abs(), sparsity))
    sparse = sten.from_dense(weight, layout, mask)
    assert torch.equal(sparse.to_dense(), weight * mask)
    if layout.rate is None:
        wrong = torch.ones_like(mask)
        wrong[5, 1:] = False
        if isinstance(layout, (FanIn, BSR)):
            with pytest.raises(ValueError, match="Expected a mask that"):
                sten.from_dense(weight, layout, wrong)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
@pytest.mark.parametrize("layout", [sten.CSR(), sten.NM(16, 32), sten.FanIn(), sten.GroupedNM(2, 4, 8)], ids=str)
def test_large_parts_ask_for_huge_pages(layout):
    """The middle of the values is memory with the advice ("hg"), whether or not the system has followed it."""
    score = torch.randn(2048, 2112)
    weight = sten.from_dense(score, layout, layout.mask(score, None if layout.rate else 0.25))
    values, flags, inside = weight.parts["values"], "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("VmFlags:") and inside:
            flags = line
        elif (span := line.split(" ")[0].split("-")) and len(span) == 2:
            inside = int(span[0], 16) <= values.data_ptr() + values.nbytes // 2 < int(span[1], 16)
    assert values.nbytes >= 4 << 20 and " hg" in flags, flags
