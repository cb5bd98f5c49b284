"""Run by test_cpp_threads.py in processes with other OpenMP settings: right results, the same each time."""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import sten

LAYOUTS = [
    (sten.CSR(), 0.9),
    (sten.FanIn(), 0.9),
    (sten.BSR((16, 16)), 0.8),
    (sten.NM(16, 32), None),
    (sten.VectorNM(1, 4, 8), None),
    (sten.GroupedNM(1, 4, 4), None),
]
TOKENS = (1, 16, 200)


def weights() -> list[torch.Tensor]:
    made = []
    for layout, sparsity in LAYOUTS:
        dense = torch.randn(320, 512)
        made.append(sten.from_dense(dense, layout, layout.mask(dense.abs(), sparsity)))
    return made


def inputs() -> list[torch.Tensor]:
    return [torch.randn(tokens, 512) for tokens in TOKENS]


def results(sparse: list[torch.Tensor], xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Products, their gradients, and packed weights."""
    made = []
    for weight in sparse:
        weight = weight.detach().requires_grad_()
        for x in xs:
            x = x.detach().requires_grad_()
            y = F.linear(x, weight)
            made += [
                y.detach(),
                *(g.to_dense() if g is not x else g for g in torch.autograd.grad(y.square().sum(), (x, weight))),
            ]
        made.append(weight.detach().to_dense())
    for layout, sparsity in LAYOUTS:
        made.append(layout.mask(xs[-1].abs(), sparsity))
    return made


def expect_right(got: list[torch.Tensor], sparse: list[torch.Tensor], xs: list[torch.Tensor]) -> None:
    each = iter(got)
    for weight in sparse:
        dense, mask = weight.to_dense(), weight.mask()
        for x in xs:
            y = x @ dense.t()
            for want, have in zip((y, 2 * y @ dense, (2 * y.t() @ x) * mask), each, strict=False):
                torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-3 * float(want.abs().max()))
        assert torch.equal(next(each), dense)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Products(Dataset):
    """Each item is computed by the kernels, in a worker that was forked."""

    def __init__(self, weight: torch.Tensor, x: torch.Tensor):
        self.weight, self.x = weight, x

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return F.linear(self.x[i], self.weight)


def main() -> None:
    torch.manual_seed(0)
    sparse, xs = weights(), inputs()
    for threads in map(int, sys.argv[1:]):
        torch.set_num_threads(threads)
        first = results(sparse, xs)
        expect_right(first, sparse, xs)
        assert all(same(first, results(sparse, xs)) for _ in range(2)), f"{threads} threads: another result"
        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(lambda _: results(sparse, xs), range(2)))
        assert all(same(first, other) for other in made), f"{threads} threads, two callers: another result"
    for weight in sparse:
        items = torch.cat(list(DataLoader(Products(weight, xs[1]), num_workers=2, batch_size=2)))
        torch.testing.assert_close(items, F.linear(xs[1][:4], weight), rtol=1e-4, atol=1e-3)
    print("done")


if __name__ == "__main__":
    main()
