"""A weight as a padded matrix and back, also with its inputs last, for groups along the inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def pad_matrix(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zero rows below and zero columns on the right, up to this size; itself if it has it already."""
    more_rows, more_columns = rows - matrix.shape[0], columns - matrix.shape[1]
    return F.pad(matrix, (0, more_columns, 0, more_rows)) if more_rows or more_columns else matrix


def cut(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight of this shape from the upper left corner of a padded matrix, contiguous."""
    return matrix[: shape[0], : math.prod(shape[1:])].reshape(shape).contiguous()


def reduction_last(weight: Tensor, m: int) -> Tensor:
    """A weight (O, I, *rest) as the matrix (O, prod(rest) * Ip): inputs last, padded to Ip, a multiple of m."""
    last = weight.movedim(1, -1)
    pad = -weight.shape[1] % m
    last = F.pad(last, (0, pad)) if pad else last
    return last.reshape(weight.shape[0], -1)


def reduction_back(matrix: Tensor, shape: tuple[int, ...], m: int) -> Tensor:
    """The inverse of `reduction_last`: the weight of this shape, its padding cut off."""
    inputs = shape[1]
    last = matrix.view(shape[0], *shape[2:], inputs + -inputs % m)
    return last[..., :inputs].movedim(-1, 1).contiguous()


def reduction_width(shape: tuple[int, ...], m: int) -> int:
    """The columns of `reduction_last`'s matrix for a weight of this shape: prod(rest) * Ip."""
    return math.prod(shape[2:]) * (shape[1] + -shape[1] % m)


def reduction_groups(shape: tuple[int, ...], m: int) -> Tensor:
    """The group of m inputs of each column of `weight.flatten(1)`, numbered as in `reduction_last`'s matrix."""
    inputs, positions = shape[1], math.prod(shape[2:])
    group = torch.arange(positions) * -(-inputs // m) + torch.arange(inputs).unsqueeze(1) // m
    return group.flatten()


def describe_column(shape: tuple[int, ...], column: int, m: int) -> str:
    """A column of `reduction_last`'s matrix in words, for error messages: 'input 3, kernel position (0, 1)'."""
    width = shape[1] + -shape[1] % m
    number, position = column // width, []
    for size in reversed(shape[2:]):
        position.insert(0, number % size)
        number //= size
    return f"input {column % width}" + (f", kernel position {tuple(position)}" if position else "")
