"""JumpReLU: a threshold for each feature, learned with a pseudo-derivative."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .activation import ActivationMethod, State


def _window(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """K((z - theta) / bandwidth) of the rectangle kernel: whether z is within half a bandwidth of its threshold."""
    return (z - theta).abs() < bandwidth / 2


def _over_rows(per_entry: Tensor, like: Tensor) -> Tensor:
    return per_entry.sum_to_size(like.shape).to(like.dtype)


class Jump(torch.autograd.Function):
    """z * 1[z > theta], theta = exp(log_threshold).

    With density q of z, d/dtheta E[g z 1[z > theta]] = -theta E[g | z = theta] q(theta), and the rectangle estimates
    q by K / bandwidth. The chain rule of the exponential brings a second theta: -(theta^2 / bandwidth) K g.
    """

    @staticmethod
    def forward(z, log_threshold, bandwidth):
        return torch.where(z > log_threshold.exp().to(z.dtype), z, 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, log_threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(z, log_threshold)

    @staticmethod
    def backward(ctx, grad):
        z, log_threshold = ctx.saved_tensors
        theta = log_threshold.exp().to(z.dtype)
        slope = -theta.square() / ctx.bandwidth * _window(z, theta, ctx.bandwidth) * grad
        return torch.where(z > theta, grad, 0), _over_rows(slope, log_threshold), None


class Count(torch.autograd.Function):
    """1[z > theta], whose pseudo-derivative in theta is -K / bandwidth: in log_threshold -(theta / bandwidth) K."""

    @staticmethod
    def forward(z, log_threshold, bandwidth):
        return (z > log_threshold.exp().to(z.dtype)).to(z.dtype)

    setup_context = staticmethod(Jump.setup_context)

    @staticmethod
    def backward(ctx, grad):
        z, log_threshold = ctx.saved_tensors
        theta = log_threshold.exp().to(z.dtype)
        slope = -theta / ctx.bandwidth * _window(z, theta, ctx.bandwidth) * grad
        return None, _over_rows(slope, log_threshold), None


@dataclass(frozen=True)
class JumpReLU(ActivationMethod):
    """The entries above a threshold that is learned, one for each feature: z * 1[z > exp(log_threshold)].

    The parameter is `log_threshold`, under the module of the site: `sparse_output_log_threshold` for its output.

    Args:
        threshold: where it starts.
        bandwidth: entries so near their threshold teach it.

    Example:
        >>> import torch, sten
        >>> encode = sten.sparsify(torch.nn.Linear(8, 32), site="output", sparsifier=sten.JumpReLU(0.1, bandwidth=0.05))
        >>> encode.sparse_output_log_threshold.shape
        torch.Size([32])

    Source: Rajamanoharan et al., Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders,
    https://arxiv.org/abs/2407.14435.
    """

    threshold: float = 0.001
    bandwidth: float = 0.001

    kind: ClassVar[str] = "streaming"
    takes_gradients: ClassVar[bool] = False
    full_gradient: ClassVar[bool] = True  # entries below the threshold teach it

    def __post_init__(self) -> None:
        if not (self.threshold > 0 and self.bandwidth > 0):
            raise ValueError(f"Expected a positive threshold and bandwidth for JumpReLU, got {self}.")

    def init(self, features: int | None) -> State:
        size = () if features is None else (features,)
        return {"log_threshold": nn.Parameter(torch.full(size, math.log(self.threshold)))}

    def mask(self, x: Tensor, state: State, training: bool) -> Tensor:
        return x > state["log_threshold"].exp().to(x.dtype)

    def apply(self, x: Tensor, state: State, training: bool) -> tuple[Tensor, Tensor]:
        y = Jump.apply(x, state["log_threshold"], self.bandwidth)
        return y, self.mask(x.detach(), state, training)

    def count(self, x: Tensor, log_threshold: Tensor) -> Tensor:
        """The mean number of entries above their thresholds in a row, differentiable in the thresholds: an L0 penalty.

        Example:
            >>> import torch, sten
            >>> log_threshold = torch.zeros(3, requires_grad=True)
            >>> sten.JumpReLU().count(torch.tensor([[0.5, 2.0, 3.0]]), log_threshold)
            tensor(2., grad_fn=<MeanBackward0>)
        """
        return Count.apply(x, log_threshold, self.bandwidth).sum(-1).mean()
