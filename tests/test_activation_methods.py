"""The methods for activations and gradients: their laws, and what their papers say of them."""

from dataclasses import dataclass

import pytest
import torch

import sten
from sten.layouts import NM
from sten.sparsifiers.activation import ActivationMethod
from sten.sparsifiers.activations import columns_by_key

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = [
    sten.Threshold(0.3),
    sten.Threshold(0.3, straight_through=True),
    sten.Threshold(0.1, signed=True),
    sten.Threshold(sparsity=0.5),
    sten.TopK(3),
    sten.TopK(0.25, straight_through=True),
    sten.TopK(2, block=4),
    sten.BatchTopK(3),
    sten.BatchTopK(0.2, straight_through=True),
    sten.RandomFraction(0.3),
    sten.MVUE24(),
    sten.MVUE24(dim=0),
    sten.JumpReLU(0.3, 0.5),
]


@pytest.mark.filterwarnings("ignore:.*keeps all entries")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_laws(method):
    assert sten.testing.check_sparsifier(method).method == method


@pytest.mark.parametrize("method", [sten.TopK(2, block=4), sten.MVUE24()], ids=str)
def test_n_of_m_is_stored(method):
    assert sten.testing.check_sparsifier(method, NM(2, 4)).layouts == (NM(2, 4),)


@dataclass(frozen=True)
class Wrong(ActivationMethod):
    """Breaks one law."""

    fault: str

    kind = "streaming"

    def mask(self, x, state, training):
        return x > (x.mean() if self.fault == "kind" else 0)

    def apply(self, x, state, training):
        y, mask = super().apply(x, state, training)
        if self.fault == "off the mask":
            y = y + 1
        elif self.fault == "gradient":
            y = y.detach() + 0 * x
        elif self.fault == "dtype":
            y = y.float()
        elif self.fault == "input":
            x.detach().zero_()
        return y, mask


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("kind", "declared streaming"),
        ("off the mask", "zero off its mask"),
        ("gradient", "must be y / x"),
        ("dtype", "keep the dtype"),
        ("input", "must not change its input"),
    ],
)
def test_the_check_finds_faults(fault, law):
    with pytest.raises(AssertionError, match=law):
        sten.testing.check_sparsifier(Wrong(fault))


def applied(method, x, training=True, **state):
    return method.apply(x, state, training)


def test_top_k_breaks_ties_by_index_and_counts_nan_lowest():
    x = torch.tensor([[1.0, 2, -2, 2, 0], [torch.nan, 1, 1, 0, 0]])
    mask = applied(sten.TopK(2), x)[1]
    assert mask.tolist() == [[False, True, True, False, False], [False, True, True, False, False]]
    assert applied(sten.TopK(5), x)[1].all() and applied(sten.TopK(0.1), x)[1].sum() == 2
    torch.manual_seed(0)
    many = torch.randint(-3, 4, (50, 33)).float()
    for k in (1, 7, 33):
        mask = applied(sten.TopK(k), many)[1]
        columns = mask.nonzero()[:, 1].view(50, k)
        assert torch.equal(sten.TopK(k).columns(many), columns)
        assert torch.equal(columns_by_key(many.abs(), k), columns)
    assert columns_by_key(torch.tensor([[1.0, -torch.inf, 1, 0]]), 3).tolist() == [[0, 2, 3]]


def test_batch_top_k():
    """The largest of the batch; alone, a token keeps what is above the running threshold."""
    torch.manual_seed(0)
    method, running = sten.BatchTopK(4, momentum=0.5), torch.tensor(0.0)
    x = torch.randn(64, 32)
    y, mask = applied(method, x, threshold=running)
    assert int(mask.sum()) == 4 * 64 and y[mask].abs().min() > x[~mask].abs().max()
    least = y[mask].abs().min()
    torch.testing.assert_close(running, least)
    applied(method, x * 3, threshold=running)
    torch.testing.assert_close(running, (least + 3 * least) / 2)
    running.copy_(least)
    alone = torch.cat([applied(method, row, False, threshold=running)[1] for row in x.split(1)])
    assert int((alone != mask).sum()) <= 1  # the least itself is not above the threshold
    before = running.clone()
    applied(method, x * 9, False, threshold=running)
    assert torch.equal(running, before)


def test_random_fraction_is_unbiased():
    torch.manual_seed(0)
    x = torch.randn(1, 8).expand(20000, 8)
    y = applied(sten.RandomFraction(0.25), x)[0]
    assert abs(float((y != 0).float().mean()) - 0.25) < 0.01
    torch.testing.assert_close(y.mean(0), x[0], atol=0.05, rtol=0.05)
    assert torch.equal(applied(sten.RandomFraction(0.25), x, False)[0], x)


GROUPS = [[1.0, 2, 3, 4], [1, 1, 1, 1], [0.1, 0.2, -0.3, 5], [0, 0, -2, 0], [0, 3, 0, -1], [0, 0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_mvue_is_unbiased_with_the_least_variance(group):
    """The variance is the optimum of a convex problem: min over p of sum x^2 (1/p - 1), sum p <= 2, p <= 1."""
    torch.manual_seed(0)
    x = torch.tensor(group, dtype=torch.float32)
    n = 40000
    y, mask = applied(sten.MVUE24(), x.expand(n, 4))
    assert int(mask.sum(-1).max()) <= 2
    error = y.std(0) / n**0.5
    assert bool(((y.mean(0) - x).abs() <= 5 * error + 1e-5).all())
    a, low, high = x.double().abs(), 1e-12, 1e3
    for _ in range(100):  # p = min(1, a / level), and the level by bisection
        level = (low * high) ** 0.5
        p = (a / level).clamp(max=1)
        low, high = (level, high) if p.sum() > 2 else (low, level)
    best = float(torch.where(a > 0, a.square() * (1 / p.clamp(min=1e-12) - 1), 0).sum())
    assert float(y.double().var(0).sum()) == pytest.approx(best, rel=0.05, abs=1e-3)


def test_mvue_of_tokens():
    torch.manual_seed(0)
    x = torch.randn(10, 6)  # the last group is short
    _, mask = applied(sten.MVUE24(dim=0), x)
    assert bool((mask.view(10, 6)[:8].view(2, 4, 6).sum(1) == 2).all()) and int(mask[8:].sum(0).max()) <= 2


def test_the_gradient_of_jump_relu_is_that_of_finite_differences():
    """Of E[g z 1[z > theta]] in theta: over half a bandwidth on both sides the difference counts the same window.

    Its entries are within that of theta, as the derivation takes them all to be theta: an error of order (h / theta).
    """
    torch.manual_seed(0)
    theta, width = 0.5, 0.02
    z, g = torch.rand(400_000, 2, dtype=torch.float64) * 2, torch.tensor([1.0, -3.0], dtype=torch.float64)
    method = sten.JumpReLU(theta, width)
    log = torch.full((2,), theta, dtype=torch.float64).log().requires_grad_()
    y, mask = method.apply(z, {"log_threshold": log}, True)
    assert torch.equal(y, z * (z > theta)) and torch.equal(mask, z > theta)
    (y * g).sum(1).mean().backward()

    def loss(at):
        return (z * (z > at) * g).mean(0)

    want = theta * (loss(theta + width / 2) - loss(theta - width / 2)) / width  # d / d log theta
    torch.testing.assert_close(log.grad, want, rtol=0.01, atol=0)
    exact = -(theta**2) * 0.5 * g  # the density of z is 1 / 2
    torch.testing.assert_close(log.grad, exact, rtol=0.05, atol=0)

    log.grad = None
    method.count(z, log).backward()
    want = theta * ((z > theta + width / 2).double().mean(0) - (z > theta - width / 2).double().mean(0)) / width
    torch.testing.assert_close(log.grad, want, rtol=1e-3, atol=0)


def test_jump_relu_passes_the_gradient_above_its_threshold():
    z = torch.tensor([[0.2, 0.6, 2.0]], requires_grad=True)
    log = torch.zeros(3)
    sten.JumpReLU(1.0, 0.1).apply(z, {"log_threshold": log - 0.5}, True)[0].sum().backward()
    assert z.grad.tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sten.TopK(0), "Expected a positive count or a fraction below 1 for TopK"),
        (lambda: sten.TopK(1.5), "Expected a positive count or a fraction"),
        (lambda: sten.TopK(True), "Expected a positive count or a fraction"),
        (lambda: sten.TopK(5, block=4), "Expected a block of at least k=5"),
        (lambda: sten.BatchTopK(-1), "Expected a positive count"),
        (lambda: sten.BatchTopK(2, momentum=2.0), "Expected momentum from 0.0 to 1.0"),
        (lambda: sten.RandomFraction(0), "Expected a fraction above 0"),
        (lambda: sten.RandomFraction(2), "Expected fraction from 0.0 to 1.0"),
        (lambda: sten.Threshold(), "Expected either value= or sparsity="),
        (lambda: sten.Threshold(1.0, sparsity=0.5), "Expected either value= or sparsity="),
        (lambda: sten.MVUE24(dim=2), "Expected dim=0"),
        (lambda: sten.JumpReLU(-1.0), "Expected a positive threshold"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
