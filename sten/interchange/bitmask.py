"""Checkpoints of compressed-tensors (llm-compressor, vLLM) in the formats sparse-bitmask and sparse-24-bitmask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checked import checked
from ..errors import FormatError
from ..layouts import NM
from ..tensor import SparseTensor

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def from_compressed_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a compressed-tensors checkpoint, with each sparse weight as one SparseTensor.

    A weight `fc.weight` is found as `fc.shape`, `fc.compressed`, `fc.bitmask` (and `fc.row_offsets`), or under
    `fc.weight.shape`, ...; sparse-bitmask becomes CSR, sparse-24-bitmask NM(2, 4). All other entries stay as they are.

    Args:
        state: name -> tensor, as `safetensors.torch.load_file` returns it.

    Raises:
        FormatError: an incomplete weight, or shapes and bits that do not fit each other.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.tensor([[0.0, 1.0, 2.0, 0.0]]), sten.CSR())
        >>> state = sten.to_compressed_tensors({"fc.weight": w})
        >>> sorted(state)
        ['fc.bitmask', 'fc.compressed', 'fc.row_offsets', 'fc.shape']
        >>> sten.from_compressed_tensors(state)["fc.weight"].sparse_layout
        CSR()
    """
    rest, found = dict(state), {}
    for key in [key for key in state if key == "compressed" or key.endswith(".compressed")]:
        prefix = key.removesuffix("compressed")
        parts = {part: rest.pop(prefix + part) for part in PARTS if prefix + part in rest}
        name = prefix.removesuffix(".") if prefix.endswith("weight.") else prefix + "weight"
        try:
            found[name] = _weight(parts)
        except ValueError as error:
            raise FormatError(f"{name}: {error}") from error
    if clash := sorted(found.keys() & rest.keys()):
        raise FormatError(f"Expected one form of each weight, got {clash[0]} both dense and compressed.")
    return {**rest, **found}


def _weight(parts: dict[str, Tensor]) -> SparseTensor:
    plain = all(type(part) is Tensor and part.layout == torch.strided and not part.is_meta for part in parts.values())
    if any(name not in parts for name in PARTS[:3]) or not plain:
        raise ValueError(f"Expected dense tensors {list(PARTS[:3])} with numbers, got {sorted(parts)} or others.")
    shape, values, bits = parts["shape"].flatten(), parts["compressed"], parts["bitmask"]
    if len(shape) != 2 or shape.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"Expected two whole numbers for 'shape', got {len(shape)} of {shape.dtype}.")
    rows, columns = (int(size) for size in shape)
    if bits.dtype != torch.uint8 or min(rows, columns) < 0 or tuple(bits.shape) != (rows, -(-columns // 8)):
        raise ValueError(
            f"Expected uint8 of shape {(rows, -(-columns // 8))} for 'bitmask', got {bits.dtype} of shape "
            f"{tuple(bits.shape)}."
        )
    wide = ((bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1).bool().flatten(1)
    mask, count = wide[:, :columns], values.numel()
    if bool(wide[:, columns:].any()) or int(mask.sum()) != count:
        raise ValueError(
            f"Expected {count} bits in 'bitmask', as many as numbers in 'compressed', got {int(wide.sum())}."
        )
    if values.dim() == 1:
        crow = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        offsets = parts.get("row_offsets", crow[:-1])
        if tuple(offsets.shape) != (rows,) or not torch.equal(offsets.to(crow), crow[:-1]):
            raise ValueError("Expected the start of each row in 'row_offsets', got others than those of 'bitmask'.")
        own = {"values": values.contiguous().clone(), "crow": crow.int(), "col": mask.nonzero()[:, 1].int()}
        return SparseTensor(*checked("CSR", {}, own, (rows, columns)))
    groups = columns // 4
    if (
        tuple(values.shape) != (rows, 2 * groups)
        or columns % 4
        or bool((mask.reshape(rows, groups, 4).sum(2) != 2).any())
    ):
        raise ValueError(
            f"Expected two of four inputs of shape {(rows, columns)}, got others, or a wrong 'compressed'."
        )
    position = mask.reshape(rows, groups, 4).nonzero()[:, 2].view(rows, groups, 2)
    own = {"values": values.contiguous().clone(), "index": NM(2, 4).packed(position)}
    return SparseTensor(*checked("NM", {"n": 2, "m": 4}, own, (rows, columns)))


def to_compressed_tensors(state: Mapping[str, Tensor], format: str = "sparse-bitmask") -> dict[str, Tensor]:
    """A state dict as compressed-tensors stores it: each SparseTensor as its numbers and a bitmask.

    Args:
        state: of a finalized model, or name -> tensor.
        format: `"sparse-bitmask"`, of every layout, or `"sparse-24-bitmask"`, of weights with two of four inputs. It
            belongs into the checkpoint's `config.json`, as `sparsity_config["format"]`.

    Returns:
        Tensors on the CPU. A weight `fc.weight` is stored as `fc.shape`, `fc.compressed`, `fc.bitmask` and, of
        sparse-bitmask, `fc.row_offsets`; entries that are not sparse stay as they are.

    Raises:
        ValueError: another format; a weight that is no matrix, or not two of four.

    Example:
        >>> import torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4))
        >>> state = sten.to_compressed_tensors(model.state_dict(), "sparse-24-bitmask")
        >>> tuple(state["compressed"].shape), tuple(state["bitmask"].shape)
        ((4, 4), (4, 1))
    """
    if format not in FORMATS:
        raise ValueError(f"Expected a format of {list(FORMATS)}, got {format!r}.")
    out: dict[str, Tensor] = {}
    for name, w in state.items():
        if not isinstance(w, SparseTensor):
            out[name] = w
            continue
        if w.dim() != 2:
            raise ValueError(f"{name}: Expected a matrix for {format}, got shape {tuple(w.shape)}; densify it first.")
        prefix, (rows, columns) = name.removesuffix("weight") if name.endswith("weight") else name + ".", w.shape
        mask, dense = w.detach().mask().cpu(), w.detach().to_dense().cpu()
        bits = torch.nn.functional.pad(mask, (0, -columns % 8)).view(rows, -1, 8).to(torch.uint8)
        packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
        if format == "sparse-bitmask":
            count = mask.sum(1)
            own = {"shape": torch.tensor([rows, columns]), "compressed": dense[mask], "bitmask": packed}
            own["row_offsets"] = count.cumsum(0) - count
        else:
            if columns % 4 or bool((mask.view(rows, -1, 4).sum(2) != 2).any()):
                raise ValueError(
                    f"{name}: Expected two of four inputs for sparse-24-bitmask, got {w.sparse_layout} of shape "
                    f"{tuple(w.shape)}; use sparse-bitmask."
                )
            own = {
                "shape": torch.tensor([[rows], [columns]]),
                "compressed": dense[mask].view(rows, -1),
                "bitmask": packed,
            }
        out.update({prefix + part: tensor for part, tensor in own.items()})
    return out
