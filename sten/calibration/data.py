"""Calibration: the batches, how the engine runs, and which tokens of a batch count."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..training.uninterrupted import uninterrupted
from .trees import leaves, mapped

MASKS = ("attention_mask", "decoder_attention_mask")  # 0 at padding
RUNNING = "_sten_running"  # an attribute of modules that `inference` runs, whose weights nobody may convert meanwhile
PADDING = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")  # True at padding: torch.nn's


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches for `calibration=` of `sten.sparsify` and `sten.plan`, with options.

    Args:
        batches: an iterable, read once. Each is a tensor, a tuple (`model(*batch)`) or a dictionary as tokenizers make
            it (`model(**batch)`). Where forward gets an `attention_mask` of shape (batch, tokens), tokens with 0 are in
            no statistic, nor those with True of a `src_key_padding_mask`.
        blocks: the modules that are pruned one after another, in the order of their calls: a glob over names of
            modules ("model.layers.*"), a ModuleList, or a list of names and modules. Default: the members, of one
            class, of the outermost ModuleLists and Sequentials that contain chosen weights.
        true_sequential: collect statistics anew after each group of weights on one input (q, k, v; o; gate, up; down),
            as they are called; else once a block, with its weights dense. Slower by the number of groups.
        commit: "end": all weights are written at the end or, on an error, none. "block": those of each block as soon as
            it is decided, which frees its dense weights; after an error the blocks that are done stay sparse.
        device: where each block runs, is measured and decided, while the model stays where it is; None: in its place.
        offload: where the inputs of the next block wait: None, where they arise; "cpu"; or a folder, on the disk.
        folder: keeps the decisions of each block in files, from which a second call with the same model, methods and
            batches goes on. None: nothing is kept.
        progress: whether to show a progress bar (by tqdm); None: where tqdm is installed and stderr is a terminal.

    Raises:
        ValueError, TypeError: no batches, or something else than batches or options.

    Example:
        >>> import torch, sten
        >>> batches = [torch.randn(4, 16) for _ in range(8)]
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> model = sten.sparsify(model, sten.NM(2, 4), sten.Wanda(), calibration=sten.Calibration(batches))
        >>> model[2].weight.density
        0.5
    """

    batches: Iterable = field(repr=False)
    blocks: Any = None
    true_sequential: bool = False
    commit: Literal["end", "block"] = "end"
    device: torch.device | str | None = None
    offload: str | os.PathLike | None = None
    folder: str | os.PathLike | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batches, (Tensor, Mapping, str)) or not isinstance(self.batches, Iterable):
            raise TypeError(
                f"Expected for calibration= an iterable of batches, got {_kind(self.batches)}; write [batch] for one."
            )
        if self.commit not in ("end", "block"):
            raise ValueError(f'Expected commit="end" or commit="block", got {self.commit!r}.')
        batches = list(self.batches)
        if not batches:
            raise ValueError("Expected batches for calibration=, got none; an iterator can be read only once.")
        for batch in batches:
            if not isinstance(batch, (Tensor, Mapping, tuple, list)):
                raise TypeError(
                    "Expected each batch of calibration= to be a tensor, a tuple of arguments or a dictionary, got "
                    f"{_kind(batch)}; tokenize texts first."
                )
        object.__setattr__(self, "batches", batches)
        object.__setattr__(self, "device", None if self.device is None else torch.device(self.device))


def _kind(value: Any) -> str:
    return f"one {type(value).__name__}" if isinstance(value, (Tensor, Mapping)) else repr(value)[:80]


def calibration_of(given: Calibration | Iterable | None) -> Calibration | None:
    """`calibration=` as users write it: batches alone mean the defaults."""
    return given if given is None or isinstance(given, Calibration) else Calibration(given)


def on_device(tree: Any, device: torch.device | None) -> Any:
    """The tensors of a batch, or of arguments, on a device; None: as they are."""
    if device is None:
        return tree
    return mapped(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def run_batch(model: nn.Module, batch: Any, index: int) -> Any:
    """The model's output of a batch."""
    first = next(model.parameters(), None)
    batch = mapped(_ordinary, dict(batch) if isinstance(batch, Mapping) else batch)
    batch = on_device(batch, None if first is None else first.device)
    try:
        if isinstance(batch, dict):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except Exception as error:
        error.add_note(f"sten: in batch {index} of calibration=; a batch has what the model's forward takes.")
        raise


def _ordinary(leaf: Any) -> Any:
    """A tensor of inference mode as one that autograd may save."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


class Tokens:
    """Which tokens of one batch count: its masks of shape (batch, tokens), and how they lie over an input.

    Attributes:
        masks: those with padding.
        shapes: of all masks.
    """

    def __init__(self, given: Mapping, decodes: bool = False) -> None:
        found = {name: t for name in MASKS if isinstance(t := given.get(name), Tensor)}
        torch_nn = {name: given.get(name) for name in PADDING}
        found |= {name: ~t for name, t in torch_nn.items() if isinstance(t, Tensor) and t.dtype == torch.bool}
        for name, t in found.items():
            if t.dim() != 2:
                raise ValueError(
                    f"Expected {name} of shape (batch, tokens) in calibration=, which says what is padding, got shape "
                    f"{tuple(t.shape)}."
                )
        if decodes and "attention_mask" in found and len(found) == 1:  # a decoder without padding
            decoded = given.get("decoder_input_ids", given.get("labels"))
            if isinstance(decoded, Tensor):
                found["decoder_attention_mask"] = torch.ones_like(decoded)
        self.masks = [mask.bool() for mask in found.values() if not bool(mask.bool().all())]
        self.shapes = {tuple(mask.shape) for mask in found.values()}
        if (
            len(found) == 2
            and len(self.shapes) == 1
            and self.masks
            and not torch.equal(*map(Tensor.bool, found.values()))
        ):
            raise ValueError(
                "Expected batches whose encoder and decoder lengths differ, so that their padding can be told apart, "
                f"got {tuple(self.masks[0].shape)} twice; pad one of them to another length."
            )

    def of(self, shape: tuple[int, ...]) -> Tensor | None:
        """The mask over the first dimensions of an input, flattened; None: it has no padding, or another order."""
        rows = shape[0] if len(shape) == 2 else None
        for mask in self.masks:
            if (tuple(mask.shape) == tuple(shape[:2]) and len(shape) > 2) or rows == mask.numel():
                return mask.flatten()
            if len(shape) > 2 and tuple(mask.shape) == (shape[1], shape[0]):  # tokens first
                return mask.t().flatten()
        return None

    def knows(self, shape: tuple[int, ...]) -> bool:
        """Whether the rows of an input are the tokens of a batch."""
        sizes = {(*s, 0) for s in self.shapes} | {(*s[::-1], 0) for s in self.shapes}
        return (*shape[:2], 0) in sizes if len(shape) > 2 else any(shape[0] == a * b for a, b, _ in sizes)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Forward passes without gradients, dropout or caches of generation; all as it was at the end.

    Conversions that the model's own forward or hooks call meanwhile are refused.
    nn.TransformerEncoder calls its layers one by one, on plain tensors, not its fast path on nested ones.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, _ in modes:
            module.__dict__[RUNNING] = id(module)  # a copy that is made meanwhile is free
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        for config in cached:
            config.use_cache = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled graphs do not see new hooks
            yield
    finally:
        with uninterrupted():
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training in modes:
                module.__dict__.pop(RUNNING, None)
                module.training = training
            for config in cached:
                config.use_cache = True


def tokens_of(model: nn.Module, batches: list) -> list[Tokens]:
    """Those of each batch."""
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return [Tokens(_named(batch, names), decodes) for batch in batches]


def _named(batch: Any, names: list[str]) -> Mapping:
    """The arguments of a batch by the names that forward has for them, and those of a dictionary among them."""
    if isinstance(batch, Mapping):
        return batch
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    inner = next((part for part in parts if isinstance(part, Mapping)), {})
    return {**dict(zip(names, parts, strict=False)), **inner}


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    return [
        leaf for _, leaf in leaves(dict(batch) if isinstance(batch, Mapping) else batch) if isinstance(leaf, Tensor)
    ]
