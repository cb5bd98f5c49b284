"""Sparse autoencoders, TopK, BatchTopK and JumpReLU, whose dead latents are revived: python sparse_autoencoder.py topk

The data are sums of a few of many directions, which the autoencoder has to find.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import sten

METHODS = {
    "topk": lambda k: (sten.TopK(k), sten.FanIn()),
    "batchtopk": lambda k: (sten.BatchTopK(k), sten.CSR()),
    "jumprelu": lambda k: (sten.JumpReLU(0.05, bandwidth=0.05), sten.CSR()),
}


class SparseAutoencoder(nn.Module):
    """x -> relu(x @ encoder) -> the latents that the method keeps, in its layout -> sum of their decoder rows."""

    def __init__(self, width: int, latents: int, method, layout, k: int, dead_after: int = 50):
        super().__init__()
        self.encoder, self.shift = nn.Linear(width, latents), nn.Parameter(torch.zeros(width))
        self.decoder = nn.Parameter(F.normalize(self.encoder.weight.detach().clone(), dim=1))  # (latents, width)
        self.sparse = sten.sparse_op(F.relu, out=(method, layout), features=latents)
        self.revive = sten.sparse_op(F.relu, out=(sten.TopK(2 * k), sten.FanIn()))
        self.register_buffer("idle", torch.zeros(latents, dtype=torch.long))  # steps since a latent was active
        self.dead_after, self.k = dead_after, k

    def forward(self, x):
        encoded = self.encoder(x - self.shift)
        latents = self.sparse(encoded)
        return latents @ self.decoder + self.shift, latents, encoded

    def loss(self, x, penalty: float = 0.0):
        y, latents, encoded = self(x)
        loss = (y - x).square().mean()
        active = latents.parts["index" if isinstance(latents.sparse_layout, sten.FanIn) else "col"]
        self.idle.add_(1)[active.flatten().long()] = 0
        dead = self.idle > self.dead_after
        if int(dead.sum()) >= 2 * self.k:  # they reconstruct what the others have left
            revived = self.revive(encoded.masked_fill(~dead, 0)) @ self.decoder
            loss = loss + (revived - (x - y).detach()).square().mean() / 32
        if penalty:  # JumpReLU: how many latents beyond k are active, through the thresholds
            count = self.sparse.out.method.count(encoded, self.sparse.sparse_output_log_threshold)
            loss = loss + penalty * F.relu(count / self.k - 1)
        return loss

    @torch.no_grad()
    def normalize(self):
        """Decoder rows have length 1, and their gradient no part along them; between backward and the step."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))
        along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
        self.decoder.grad.sub_(along * self.decoder)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("method", nargs="?", choices=METHODS, default="topk")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    width, latents, k, steps = (16, 64, 4, 150) if args.tiny else (64, 1024, 8, 2000)
    directions = F.normalize(torch.randn(latents // 2, width), dim=1)
    model = SparseAutoencoder(width, latents, *METHODS[args.method](k), k)
    slow = [p for name, p in model.named_parameters() if "threshold" not in name]
    fast = [p for name, p in model.named_parameters() if "threshold" in name]
    optimizer = torch.optim.Adam([{"params": slow}, {"params": fast, "lr": 0.03}], lr=3e-3)

    def batch(size=256):
        codes = torch.rand(size, latents // 2) * (torch.rand(size, latents // 2) < 2 * k / latents)
        return codes @ directions

    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(batch(), penalty=0.3 if args.method == "jumprelu" else 0.0).backward()
        model.normalize()
        optimizer.step()
    x = batch(4096)
    y, kept, _ = model.eval()(x)
    error = (y - x).square().sum() / (x - x.mean(0)).square().sum()
    active = (kept != 0).sum() / len(x)
    print(
        f"{args.method}: unexplained {error:.3f}, active {active:.1f} of {latents}, dead {int((model.idle > 50).sum())}"
    )


if __name__ == "__main__":
    main()
