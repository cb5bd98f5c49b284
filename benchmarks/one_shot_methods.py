"""Time of one-shot methods on one large layer, beside algorithm 1 of SparseGPT in plain torch.

PYTHONPATH=. python benchmarks/one_shot_methods.py [--size 4096] [--device cuda]
"""

import argparse
import time

import torch

import sten
from sten.layouts import BSR, CSR, NM, FanIn, GroupedNM, VectorNM


def algorithm_1(weight, gram, n=None, m=None, sparsity=0.5, block=128, damping=0.01):
    """Column by column in blocks of 128, as published: rank-1 updates in the block, one product behind it."""
    w, columns = weight.float().clone(), weight.shape[1]
    gram = gram + damping * gram.diagonal().mean() * torch.eye(columns, device=gram.device)
    factor = torch.linalg.cholesky(gram)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    for a in range(0, columns, block):
        b = min(a + block, columns)
        part, local = w[:, a:b].clone(), factor[a:b, a:b]
        error, dropped = torch.zeros_like(part), torch.zeros_like(part, dtype=torch.bool)
        if n is None:
            cost = part**2 / local.diagonal() ** 2
            edge = torch.sort(cost.flatten())[0][int(cost.numel() * sparsity)]
            dropped = cost <= edge
        for j in range(b - a):
            if n is not None and j % m == 0:
                cost = part[:, j : j + m] ** 2 / local.diagonal()[j : j + m] ** 2
                dropped.scatter_(1, j + torch.topk(cost, m - n, dim=1, largest=False)[1], True)
            column, pivot = part[:, j], local[j, j]
            kept = column.clone()
            kept[dropped[:, j]] = 0
            e = (column - kept) / pivot
            part[:, j:] -= e.unsqueeze(1) @ local[j, j:].unsqueeze(0)
            part[:, j] = kept
            error[:, j] = e
        w[:, a:b] = part
        w[:, b:] -= error @ factor[a:b, b:]
    return w


def error(weight, value, gram):
    d = weight - value
    return float(((d @ gram) * d).sum() / ((weight @ gram) * weight).sum())


def timed(call, device, repeats=3):
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize() if device == "cuda" else None
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize() if device == "cuda" else None
        times.append(time.perf_counter() - start)
    return min(times), result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    size, device = arguments.size, arguments.device
    torch.manual_seed(0)
    mix = torch.randn(size, size, device=device) / size**0.5 + torch.eye(size, device=device)
    x = torch.randn(4 * size, size, device=device) @ mix * (0.2 + torch.rand(size, device=device))
    weight, gram = torch.randn(size, size, device=device), x.T @ x / len(x)
    stats = {"x_gram": gram, "x_norm": gram.diagonal().sqrt(), "tokens": torch.tensor(len(x))}
    stats |= {"x_mean": x.mean(0), "x_var": x.var(0)}
    for name, arguments in (("unstructured 50 %", {}), ("2:4", {"n": 2, "m": 4})):
        seconds, value = timed(lambda a=arguments: algorithm_1(weight, gram, **a), device)
        print(f"{'algorithm 1, ' + name:70} {seconds:8.3f} s  error {error(weight, value, gram):.4f}", flush=True)
    gpt = sten.SparseGPT()
    cells = [(gpt, layout) for layout in (CSR(), FanIn(), NM(2, 4), NM(4, 8), NM(16, 32), VectorNM(2, 4, 32))]
    cells += [(gpt, layout) for layout in (BSR((32, 32)), GroupedNM(2, 4, 8))]
    cells += [(method, NM(2, 4)) for method in (sten.Wanda(), sten.DSnoT(), sten.SparseSwaps(), sten.ADMM())]
    cells += [(sten.LeastSquares(), NM(2, 4)), (sten.SparseSwaps(), CSR()), (sten.DSnoT(), CSR())]
    for method, layout in cells:
        view = sten.extend.View("w", weight, layout, None if layout.rate else 0.5, stats=stats)
        seconds, edit = timed(lambda m=method, v=view: m.update(v), device, 2)
        value = weight * edit.mask if edit.value is None else edit.value
        name = f"{method}, {layout}"
        print(f"{name:70} {seconds:8.3f} s  error {error(weight, value, gram):.4f}", flush=True)


if __name__ == "__main__":
    main()
