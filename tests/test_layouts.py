"""The layouts: masks checked by eye, the laws of the contract, oracles, bad input, GroupedNM's energies and times."""

import itertools
import math
import sys
import time

import pytest
import scipy.sparse
import torch
from cases import CONV_SHAPES, COPIES, DTYPES, LAYOUTS, SHAPES, every_layout, random_sparse_case, sparsity_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sten.extend import Layout, top, top_of_groups
from sten.layouts import BSR, CSR, NM, GroupedNM, Masked, VectorNM
from sten.layouts.patterns import patterns, revolving_door
from sten.layouts.registry import REGISTERED, layout_from
from sten.testing import check_layout
from sten.testing.layouts import same

every_shape = pytest.mark.parametrize("shape", SHAPES + CONV_SHAPES, ids=str)


def grid(text: str) -> Tensor:
    """A mask drawn by hand: x keeps, . drops."""
    return torch.tensor([[c == "x" for c in line] for line in text.split()])


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are faster on one thread, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The laws


@every_layout
def test_all_laws(layout):
    checked = check_layout(layout)
    assert checked.layout is layout and checked.cases >= 40 and len(checked.laws) == 11
    assert len(checked.shapes) >= 9 and set(checked.dtypes) == {row.dtype for row in DTYPES}


def test_the_table_has_every_registered_layout_and_a_copy_of_each():
    of_sten = {name for name, cls in REGISTERED.items() if cls.__module__.startswith("sten.layouts.")}
    assert of_sten == {type(layout).__name__ for layout in LAYOUTS}
    assert {type(layout).__name__ for layout in COPIES} == {"Other" + name for name in of_sten}
    assert not any(isinstance(copy, type(layout)) for copy in COPIES for layout in LAYOUTS)


@every_layout
def test_all_laws_on_the_table(layout):
    check_layout(layout, shapes=SHAPES + CONV_SHAPES, dtypes=[row.dtype for row in DTYPES])


@every_layout
def test_laws_without_hypothesis(layout, monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    check_layout(layout, shapes=[(9, 20), (3, 5, 3, 3)], dtypes=[torch.float32])


@every_layout
@every_shape
def test_overrides_agree_with_the_contract(layout, shape):
    dense, mask, parts = random_sparse_case(layout, shape)
    other = torch.randn(shape)
    rows = torch.randint(shape[0], (5,))
    assert same(layout.pack_like(other, parts), Layout.pack_like(layout, other, parts))
    assert same(layout.unpack_rows(parts, shape, rows), Layout.unpack_rows(layout, parts, shape, rows))
    assert torch.equal(layout.support(parts, shape), Layout.support(layout, parts, shape))
    assert torch.equal(mask, dense != 0)


@every_layout
@pytest.mark.parametrize("shape", [(13, 22), (5, 6, 3, 3)], ids=str)
def test_gradients(layout, shape):
    dense, _, parts = random_sparse_case(layout, shape, torch.float64)
    values = parts["values"].requires_grad_()
    pattern = {name: part for name, part in parts.items() if name != "values"}
    torch.autograd.gradcheck(lambda v: layout.unpack({**pattern, "values": v}, shape), values)
    torch.autograd.gradcheck(lambda w: layout.pack_like(w, parts), dense.requires_grad_())


@every_layout
@pytest.mark.parametrize("shape", [(63, 100), (7, 5, 3, 3)], ids=str)
def test_no_shape_depends_on_data(layout, shape):
    dense, _, parts = random_sparse_case(layout, shape)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(part) for name, part in parts.items()}
        assert layout.unpack(fake, shape).shape == shape
        assert layout.pack_like(mode.from_tensor(dense), fake).shape == parts["values"].shape


@every_layout
@pytest.mark.parametrize("shape", [(23, 100), (7, 5, 3, 3)], ids=str)
def test_every_tensor_is_made_on_the_device_of_its_inputs(layout, shape):
    dense, mask, parts = random_sparse_case(layout, shape)
    subset, rows = mask & (torch.rand(shape) < 0.5), torch.tensor([3, 3, 0])
    with torch.device("meta"):  # what forgets to say its device lands there, and nothing comes back from there
        assert torch.equal(layout.mask(dense.abs(), sparsity_of(layout)), mask)
        layout.validate(layout.pack(dense, mask), shape)
        layout.validate(layout.pack(dense, subset), shape)
        assert same(layout.unpack(parts, shape), dense)
        assert same(layout.unpack_rows(parts, shape, rows), dense[rows])
        assert same(layout.pack_like(dense, parts), parts["values"])
        assert torch.equal(layout.support(parts, shape), mask)


@every_layout
@pytest.mark.filterwarnings("error::UserWarning:torch._dynamo")
def test_compiles_in_one_graph(layout):
    torch._dynamo.reset()  # the code below is one code object for all layouts, and recompilations are limited
    dense, _, parts = random_sparse_case(layout, (20, 30))
    both = torch.compile(
        lambda p, w: (layout.unpack(p, (20, 30)), layout.pack_like(w, p)), fullgraph=True, backend="aot_eager"
    )
    out, values = both(parts, dense)
    assert same(out, dense) and same(values, parts["values"])


# Masks by eye


def test_masked_is_exact_in_count_and_breaks_ties_by_index():
    score = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, 0.0]])
    assert torch.equal(Masked().mask(score, 0.5), grid("x.x x.."))
    assert torch.equal(CSR().mask(torch.ones(2, 3), 0.5), grid("xxx ..."))
    assert torch.equal(CSR().mask(torch.full((2, 3), math.nan), 0.5), grid("xxx ..."))
    assert torch.equal(CSR().mask(torch.tensor([[math.nan, -9.0, math.inf, -math.inf]]), 0.5), grid(".xx."))


@pytest.mark.parametrize("dtype", [row.dtype for row in DTYPES])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_counts_are_exact(dtype, sparsity):
    score = torch.randn(37, 41).to(dtype)  # many ties in 16 bits
    assert Masked().mask(score, sparsity).sum() == round((1 - sparsity) * 37 * 41)
    blocks = BSR((4, 8)).mask(score, sparsity)
    parts = BSR((4, 8)).pack(score, blocks)
    assert len(parts["values"]) == round((1 - sparsity) * 10 * 6)


def test_top_is_stable_sort():
    score = torch.randint(0, 5, (200,)).float()
    best = torch.sort(score, descending=True, stable=True).indices
    for count in (0, 1, 57, 199, 200):
        assert torch.equal(top(score, count).nonzero()[:, 0], best[:count].sort().values)


@pytest.mark.parametrize("m", [2, 4, 8, 9, 16])
def test_top_of_groups_is_stable_sort(m):
    score = torch.randint(0, 3, (50, m)).float()
    score[3] = math.nan
    order = torch.sort(score.nan_to_num(-1.0), dim=-1, descending=True, stable=True).indices
    for n in range(1, m + 1):
        expected = torch.zeros(50, m, dtype=torch.bool).scatter(1, order[:, :n], True)
        assert torch.equal(top_of_groups(score, n), expected)


def test_nm_by_eye():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 9.0, 9.0, 9.0, 9.0, 1.0, 2.0], [0.0] * 10])
    # Two groups of four, and a short one of two columns, all of which stay.
    assert torch.equal(NM(2, 4).mask(score), grid("x.x.xx..xx xx..xx..xx"))
    assert torch.equal(NM(1, 4).mask(score), grid("x...x....x x...x...x."))
    nan = torch.tensor([[math.nan, -5.0, math.nan, -math.inf]])
    assert torch.equal(NM(1, 4).mask(nan), grid(".x.."))


def test_nm_runs_along_the_input_channels_of_a_convolution():
    score = torch.zeros(1, 6, 1, 2)
    score[0, [1, 3, 5], 0, 0] = 1.0
    score[0, [0, 2, 4], 0, 1] = 1.0
    mask = NM(2, 4).mask(score)
    assert torch.equal(mask[0, :, 0, 0], grid(".x.xxx")[0])
    assert torch.equal(mask[0, :, 0, 1], grid("x.x.xx")[0])


@pytest.mark.parametrize(("layout", "bits"), [(NM(2, 4), 2), (NM(1, 8), 4), (NM(3, 16), 4), (NM(2, 17), 8)], ids=str)
def test_nm_index_is_packed_from_the_low_bits(layout, bits):
    _, mask, parts = random_sparse_case(layout, (3, 4 * layout.m))
    where = mask.view(3, 4, layout.m).nonzero()[:, 2].view(3, -1).tolist()
    for row, positions in enumerate(where):
        number = int.from_bytes(bytes(parts["index"][row].tolist()), "little")
        assert positions == [(number >> (bits * s)) % 2**bits for s in range(len(positions))]


def test_vector_nm_by_eye():
    score = torch.tensor([[3.0, 0, 1, 0, 5], [2, 0, 4, 1, 5], [0, 1, 9, 1, 5]])
    # Rows 0 and 1 decide together, the short last vector of one row alone.
    assert torch.equal(VectorNM(1, 2, 2).mask(score), grid("x.x.x x.x.x .xx.x"))
    assert torch.equal(VectorNM(1, 2, 2).mask(torch.zeros(3, 5)), grid("x.x.x x.x.x x.x.x"))


def test_bsr_by_eye():
    score = torch.tensor([[1.0, 1, 0, 9, 2.25], [1, 1, 0, 0, 2.25], [0, 0, 5, 5, 3]])
    # Means over real entries: 1 2.25 2.25 / 0 5 3; padding counts nothing, the tie goes to the left one.
    assert torch.equal(BSR((2, 2)).mask(score, 0.5), grid("..xx. ..xx. ..xxx"))
    parts = BSR((2, 2)).pack(score, BSR((2, 2)).mask(score, 0.5))
    assert [parts[p].tolist() for p in BSR.pattern] == [[0, 1, 3], [1, 1, 2], [0, 0, 2, 3], [0, 1, 1], [0, 1, 2]]


def test_bsr_stores_dropped_entries_of_a_block_as_zeros():
    mask = grid("x... .x.. .... ....")
    parts = BSR((2, 2)).pack(torch.ones(4, 4), mask)
    assert parts["values"].tolist() == [[[1.0, 0.0], [0.0, 1.0]]]
    assert torch.equal(BSR((2, 2)).support(parts, (4, 4)), grid("xx.. xx.. .... ...."))


def test_grouped_nm_by_eye():
    # Two chunks of two columns; in each, one column keeps its first row and the other its second: 4 + 3, 0 + 9.
    score = torch.tensor([[1.0, 4.0, 0.0, 2.0], [3.0, 2.0, 1.0, 9.0]])
    mask = GroupedNM(1, 2, 1).mask(score)
    assert torch.equal(mask, grid(".xx. x..x"))
    parts = GroupedNM(1, 2, 1).pack(score, mask)
    assert parts["index"].tolist() == [[[[1], [0]]], [[[0], [1]]]]
    assert parts["values"].flatten().tolist() == [4.0, 3.0, 0.0, 9.0]
    # Equal scores: columns take the patterns in order.
    assert torch.equal(GroupedNM(1, 2, 2).mask(torch.ones(2, 4)), grid("xx.. ..xx"))


# Oracles


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_csr_is_scipys(shape, dtype):
    dense, _, parts = random_sparse_case(CSR(), shape, dtype)
    oracle = scipy.sparse.csr_matrix(dense.numpy())
    ours = [parts[name].tolist() for name in ("values", "crow", "col")]
    assert ours == [oracle.data.tolist(), oracle.indptr.tolist(), oracle.indices.tolist()]


@pytest.mark.parametrize("block", [(4, 8), (16, 16), (1, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_bsr_is_scipys(shape, block):
    dense, _, parts = random_sparse_case(BSR(block), shape)
    rows, columns = BSR(block).grid(shape)
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: shape[0], : shape[1]] = dense
    oracle = scipy.sparse.bsr_matrix(padded.numpy(), blocksize=block)
    oracle.sort_indices()
    assert parts["values"].tolist() == oracle.data.tolist()
    assert [parts[p].tolist() for p in ("crow", "col")] == [oracle.indptr.tolist(), oracle.indices.tolist()]
    numbers = scipy.sparse.csr_matrix((range(1, len(oracle.data) + 1), oracle.indices, oracle.indptr), (rows, columns))
    by_column = numbers.tocsc()
    transposed = [by_column.indptr.tolist(), by_column.indices.tolist(), [i - 1 for i in by_column.data.tolist()]]
    assert [parts[p].tolist() for p in ("t_crow", "t_row", "t_block")] == transposed


@pytest.mark.parametrize("shape", [(12, 20), (5, 3, 3, 3)], ids=str)
def test_csr_with_free_slots(shape):
    dense, mask, parts = random_sparse_case(CSR(), shape)
    longer = {name: torch.nn.functional.pad(parts[name], (0, 7)) for name in ("values", "col")}
    longer["crow"] = parts["crow"]
    CSR().validate(longer, shape)
    assert same(CSR().unpack(longer, shape), dense)
    assert torch.equal(CSR().support(longer, shape), mask)
    assert same(CSR().pack_like(torch.ones(shape), longer), torch.cat([torch.ones(mask.sum()), torch.zeros(7)]))
    assert same(CSR().unpack_rows(longer, shape, torch.tensor([0, 4])), dense[[0, 4]])
    garbage = {**longer, "values": longer["values"].clone().index_fill_(0, torch.tensor([len(longer["col"]) - 1]), 9.0)}
    assert same(CSR().unpack(garbage, shape), dense)
    with pytest.raises(ValueError, match="that are padding or dropped, got 1 other"):
        CSR().validate(garbage, shape)


# GroupedNM


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 7), (4, 8), (1, 1), (5, 5), (1, 16)])
def test_patterns_are_a_revolving_door(n, m):
    order = patterns(n, m)
    assert sorted(order) == sorted(itertools.combinations(range(m), n))
    assert all(len(set(a) - set(b)) == 1 for a, b in itertools.pairwise(order))
    stored = torch.zeros(1, len(order), m, dtype=torch.bool)
    for p, rows in enumerate(order):
        stored[0, p, list(rows)] = True
    assert GroupedNM(n, m, 1).rank(stored)[0].tolist() == list(range(len(order)))
    assert torch.equal(revolving_door(n, m, stored.device), torch.tensor(order))


@pytest.mark.parametrize("layout", [GroupedNM(2, 4, 8), GroupedNM(1, 10, 3), GroupedNM(3, 3, 5)], ids=str)
@pytest.mark.parametrize("shape", [(40, 96), (11, 77)], ids=str)
def test_grouped_nm_stores_what_docs_layouts_says(layout, shape):
    dense, _, parts = random_sparse_case(layout, shape)
    rebuilt = torch.zeros(200, 200)
    for c, s, p, j in itertools.product(*map(range, parts["index"].shape)):
        column = layout.width * c + int(parts["index"][c, s, p, j])
        for k, row in enumerate(patterns(layout.n, layout.m)[p]):
            rebuilt[layout.m * s + row, column] = parts["values"][c, s, p, j, k]
    assert same(rebuilt[: shape[0], : shape[1]], dense)


ENERGIES = [
    (GroupedNM(2, 4, 8), 0.738),
    (GroupedNM(1, 4, 16), 0.455),
    (GroupedNM(1, 10, 8), 0.232),
    (GroupedNM(4, 8, 4), 0.763),
]


@pytest.mark.parametrize(("layout", "energy"), ENERGIES, ids=str)
def test_grouped_nm_energy_and_time_to_pack(layout, energy):
    # One thread's own time: on a busy machine the clock on the wall measures the neighbours.
    w, times = torch.randn(3072, 768), []
    for _ in range(1 if layout.n == 4 else 2):
        start, wall = time.process_time(), time.perf_counter()
        mask = layout.mask(w.abs())
        middle = time.process_time()
        parts = layout.pack(w, mask)
        times.append((middle - start, time.process_time() - middle, time.perf_counter() - wall))
    masking, packing, wall = min(times)
    reached = float((w.abs() * mask).sum(dtype=torch.float64) / w.abs().sum(dtype=torch.float64))
    print(
        f"{layout}: kept {reached:.4f}; mask {masking:.2f} s, pack {packing:.2f} s of one thread, {wall:.2f} s elapsed"
    )
    assert reached >= energy
    assert torch.equal(layout.unpack(parts, w.shape), w.masked_fill(~mask, 0))
    if layout.n < 4:
        assert masking < 3 and packing < 3  # 0.2 to 0.3 s on an idle machine


@pytest.mark.parametrize("layout", [GroupedNM(2, 4, 2), GroupedNM(1, 10, 8), GroupedNM(3, 7, 1)], ids=str)
def test_grouped_nm_is_close_to_the_optimum(layout):
    score = torch.rand(4 * layout.m, layout.width, dtype=torch.float64)
    got = float((score * layout.mask(score)).sum())
    energy = layout.energy(layout.columns(score)).repeat_interleave(layout.g, -1).numpy()
    best = sum(e[linear_sum_assignment(e, maximize=True)].sum() for e in energy)
    assert 0.995 * best <= got <= best + 1e-9


def test_grouped_nm_ignores_the_scale_of_the_score():
    score = torch.rand(16, 96, dtype=torch.float64)
    mask = GroupedNM(2, 4, 8).mask(score)
    for scale in (2.0**-1000, 2.0**1000):
        assert torch.equal(GroupedNM(2, 4, 8).mask(score * scale), mask)


def test_grouped_nm_takes_infinite_scores_first():
    score = torch.rand(8, 8)
    score[0, :2] = math.inf
    mask = GroupedNM(1, 4, 2).mask(score)
    assert mask[0, :2].all()


@pytest.mark.parametrize("layout", [GroupedNM(2, 4, 8), GroupedNM(1, 4, 3), GroupedNM(2, 5, 2)], ids=str)
def test_grouped_nm_stores_any_subset(layout):
    w = torch.randn(3 * layout.m + 1, 2 * layout.width + 3)
    mask = layout.mask(w.abs())
    for keep in (0.9, 0.5, 0.1):
        subset = mask & (torch.rand(w.shape) < keep)
        parts = layout.pack(w, subset)
        layout.validate(parts, w.shape)
        assert torch.equal(layout.unpack(parts, w.shape), w.masked_fill(~subset, 0))


def test_grouped_nm_matches_exactly_where_choice_is_narrow():
    # Rows 0-2 of a strip of 3; patterns (0,1), (1,2), (0,2) in some order, each once. Only one assignment works.
    layout = GroupedNM(2, 3, 1)
    mask = grid("x.x x.. .x.")
    for order in itertools.permutations(range(3)):
        permuted = mask[:, list(order)]
        assert torch.equal(layout.unpack(layout.pack(torch.ones(3, 3), permuted), (3, 3)) > 0, permuted)


def test_augmenting_paths_repair_a_bad_start():
    from sten.layouts.assignment import match

    fits = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    # Column 2 needs pattern 2, whose user moves to 0, whose user moves to 1.
    assert match(fits, [0, 2, 1], 1) == [1, 0, 2]
    assert match(fits[[0, 1, 1]], [0, 2, 1], 1) == [1, 2, 0]
    assert match(fits[[2, 1, 2]], [2, 0, 1], 1) is None


# Bad input


def test_errors_name_the_group_of_a_mask_that_cannot_be_stored():
    full = torch.ones(6, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"got 4 in the group of output 0 that starts at input 0; use NM\(n=2, m=4\)"):
        NM(2, 4).pack(torch.ones(6, 8), full)
    narrow = torch.zeros(2, 8, 3, 3, dtype=torch.bool)
    narrow[1, 4:7, 0, 2] = True
    with pytest.raises(ValueError, match=r"output 1 that starts at input 4, kernel position \(0, 2\)"):
        NM(2, 4).pack(torch.ones(2, 8, 3, 3), narrow)
    with pytest.raises(ValueError, match="got 2 inputs in the group of outputs 2 to 3 that starts at input 4"):
        VectorNM(1, 4, 2).pack(torch.ones(4, 8), grid("x....... x....... ....x... .....x.."))
    with pytest.raises(ValueError, match="got 2 in column 1 of outputs 2 to 3"):
        GroupedNM(1, 2, 1).pack(torch.ones(4, 2), grid("x. .x .x .x"))
    with pytest.raises(ValueError, match=r"got \(0,\) for 2 in columns 0 to 1 of outputs 0 to 1"):
        GroupedNM(1, 2, 1).pack(torch.ones(2, 2), grid("xx .."))
    with pytest.raises(ValueError, match="no such choice covers in columns 0 to 2 of outputs 0 to 2"):
        GroupedNM(2, 3, 1).pack(torch.ones(3, 3), grid("xxx x.. ..."))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: NM(5, 4), ValueError, "Expected n from 1 to 4 for NM, got 5"),
        (lambda: NM(0, 4), ValueError, "n from 1 to 4"),
        (lambda: NM(2, 300), ValueError, "m from 1 to 256"),
        (lambda: NM(2.0, 4), TypeError, "Expected a whole number for n of NM, got 2.0"),
        (lambda: NM("2", 4), TypeError, "whole number"),
        (lambda: NM(True, 4), TypeError, "whole number"),
        (lambda: VectorNM(2, 4, 0), ValueError, "v from 1 to .* for VectorNM"),
        (lambda: VectorNM(5, 4, 8), ValueError, "n from 1 to 4"),
        (lambda: GroupedNM(2, 4, 0), ValueError, "g from 1 to .* for GroupedNM"),
        (lambda: GroupedNM(3, 2, 1), ValueError, "n from 1 to 2"),
        (lambda: NM(4, 2), ValueError, r"got 4; NM keeps n of every m entries: for 2 of 4, write n=2, m=4\.$"),
        (lambda: VectorNM(4, 2, 4), ValueError, "VectorNM keeps n of every m entries: for 2 of 4"),
        (lambda: GroupedNM(4, 2, 1), ValueError, "GroupedNM keeps n of every m entries: for 2 of 4"),
        (lambda: GroupedNM(8, 16, 3), ValueError, r"at most 32767 columns .* C\(m, n\) \* g = 38610"),
        (lambda: BSR((0, 4)), ValueError, "block sizes of at least 1"),
        (lambda: BSR(16), TypeError, r"block=\(rows, columns\)"),
        (lambda: BSR((4, 4.0)), TypeError, "two whole numbers"),
        (lambda: layout_from("NM", {"n": 5, "m": 4}), ValueError, "n from 1 to 4"),
        (lambda: layout_from("NM", {"n": "x", "m": 4}), ValueError, "whole number"),
        (lambda: layout_from("NM", {"n": 2}), ValueError, r"Expected the fields \['m', 'n'\]"),
        (lambda: layout_from("NoSuch", {}), ValueError, r"Expected a registered layout .* got 'NoSuch'"),
        (lambda: NM(2, 4).mask(torch.rand(4, 4), 0.9), ValueError, "which fixes it at 0.5"),
        (lambda: CSR().mask(torch.rand(4, 4)), ValueError, "pass the fraction to drop"),
        (lambda: CSR().mask(torch.rand(4, 4), -0.1), ValueError, "from 0 to 1"),
        (lambda: NM(2, 4).mask(torch.ones(4, 4, dtype=torch.int64)), ValueError, "floating-point"),
        (lambda: NM(2, 4).mask(torch.rand(4)), ValueError, "two or more dimensions"),
        (lambda: NM(2, 4).pack(torch.rand(4, 0), torch.ones(4, 0) > 0), ValueError, "none empty"),
        (lambda: NM(2, 4).pack(torch.ones(4, 4).int(), torch.ones(4, 4) > 0), ValueError, "convert it first"),
        (lambda: NM(2, 4).pack(torch.rand(4, 4), torch.ones(4, 4)), ValueError, "bool tensor"),
        (lambda: NM(2, 4).pack(torch.rand(4, 4), torch.ones(4, 5) > 0), ValueError, r"shape \(4, 5\)"),
        (lambda: CSR().check((2**31, 4)), ValueError, "rows and columns"),
        (lambda: BSR((1, 1)).check((2**16, 2**16)), ValueError, "use larger blocks"),
        (lambda: VectorNM(1, 2, 8).check((4, 2**31)), ValueError, "columns"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, error, words):
    with pytest.raises(error, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


WRONG = [
    (CSR(), "crow", lambda t: t.flip(0), "to start at 0"),
    (CSR(), "crow", lambda t: t.index_fill(0, torch.tensor([2]), 0), "never fall"),
    (CSR(), "crow", lambda t: t + 1, "to start at 0"),
    (CSR(), "col", lambda t: t.flip(0), "to ascend within a row"),
    (CSR(), "col", lambda t: torch.cat([t, t[-1:]]), "equally long"),
    (BSR((4, 8)), "col", lambda t: t.flip(0), "Expected"),
    (BSR((4, 8)), "crow", lambda t: t.clamp(max=int(t[-1]) - 1), "to end at"),
    (BSR((4, 8)), "t_block", lambda t: t.roll(1), "to list the blocks"),
    (BSR((4, 8)), "t_row", lambda t: torch.cat([t, t[-1:]]), "one for each block"),
    (NM(2, 4), "index", lambda t: torch.full_like(t, 0b00011011), "ascending positions"),
    (NM(2, 4), "index", lambda t: torch.zeros_like(t), "ascending positions"),
    (NM(3, 7), "index", lambda t: t | 0b1111, "numbers from 0 to 6"),
    (NM(1, 4), "index", lambda t: t | 0b11000000, "spare bits"),
    (VectorNM(1, 4, 8), "index", lambda t: t.flip(1), "to ascend in a row"),
    (VectorNM(1, 4, 8), "index", lambda t: t // 4, "1 columns in each group"),
    (GroupedNM(2, 4, 8), "index", lambda t: torch.zeros_like(t), "list each of the 48 columns"),
]


@pytest.mark.parametrize(("layout", "name", "change", "words"), WRONG, ids=lambda v: None if callable(v) else str(v))
def test_validate_refuses_corrupted_parts(layout, name, change, words):
    _, _, parts = random_sparse_case(layout, (13, 50))
    with pytest.raises(ValueError, match=words):
        layout.validate({**parts, name: change(parts[name])}, (13, 50))


@every_layout
@pytest.mark.parametrize("part", [None, 3, torch.tensor(1.0), "sparse"], ids=str)
def test_validate_refuses_what_is_no_tensor(layout, part):
    _, _, parts = random_sparse_case(layout, (13, 50))
    for name in parts:
        wrong = torch.eye(3).to_sparse() if part == "sparse" else part
        with pytest.raises(ValueError, match="Expected"):
            layout.validate({**parts, name: wrong}, (13, 50))


def test_names_are_registered_once():
    with pytest.raises(TypeError, match="has registered"):
        type("NM", (Layout,), {})
    assert {type(layout).__name__ for layout in LAYOUTS} <= set(REGISTERED)
    assert all(sparsity_of(layout) is None or layout.rate is None for layout in LAYOUTS)
