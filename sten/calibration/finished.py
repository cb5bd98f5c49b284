"""Decisions that are kept in a folder, so that a call that was interrupted goes on where it stopped.

One file for each stage, in the format of `tensor_file`: of each weight "<name>.mask" and "<name>.value", if it has one.
The metadata has a digest of all that the decision follows from (the method, the batches, the rest of the model), the
digests of the dense weights, and those of what they became. A file that does not fit is ignored, and written anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from .. import tensor_file
from ..errors import FormatError
from ..sparsifiers import Edit, View
from ..training.distributed import ranks
from .data import Calibration, tensors_of
from .sites import Located


def digest(*values: str | Tensor) -> str:
    """SHA-256 of texts and tensors, in order."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach()
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update(tensor_file.as_bytes(value.cpu().contiguous()))
        else:
            total.update(f"{len(value)}:{value}".encode())
    return total.hexdigest()


def _digest_of(view: View) -> str:
    """Of a weight, and what an earlier pruning left of it; of the weight alone where that is all."""
    return digest(view.weight) if view.left is None else digest(view.weight, view.left)


def rest_of(model: nn.Module, weights: Iterable[Located]) -> Iterator[str | Tensor]:
    """Names and values of all parameters and buffers but the weights, in whichever form: the inputs follow from them.

    What a weight becomes lies under its name (`weight`, `weight_pattern`, `weight_orig`, `parametrizations.weight`).
    """
    paths = {id(module): f"{path}." if path else "" for path, module in model.named_modules()}
    owners = [(paths[id(module)], attribute) for weight in weights for module, attribute in weight.owners]
    own = tuple(f"{path}{kind}{attribute}" for path, attribute in owners for kind in ("", "parametrizations."))
    for name, t in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not name.startswith(own) and not t.is_meta:  # offloaded
            yield name
            yield t.detach().to_dense()


class Finished:
    """The files of one call.

    Attributes:
        key: digest of the batches, the method, the rest of the model, and of each stage so far.
    """

    def __init__(self, model: nn.Module, weights: list[Located], calibration: Calibration, method: str) -> None:
        self.folder = Path(calibration.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        data = [t for batch in calibration.batches for t in tensors_of(batch)]
        self.key = digest(method, str(calibration.true_sequential), *data, *rest_of(model, weights))
        self.number = 0

    def begin(self, settings: Iterable[str]) -> None:
        """Go to the next stage."""
        self.key = digest(self.key, *settings)
        self.number += 1

    @property
    def path(self) -> Path:
        rank = f"-rank-{dist.get_rank()}" if ranks() > 1 else ""  # each has its own batches
        return self.folder / f"stage-{self.number:05d}{rank}.safetensors"

    def read(self, views: dict[str, View]) -> dict[str, Edit] | None:
        """The edits of the present stage, if they were made of these dense weights, or these are what they became."""
        if not self.path.is_file():
            return None
        now = {name: {_digest_of(view), digest(view.weight)} for name, view in views.items()}
        try:
            with tensor_file.open_file(self.path) as file:
                header = tensor_file.read_header(file)
                known = json.loads(header.metadata.get("sten_calibration", "{}"))
                if known.get("key") != self.key or known.get("weights", {}).keys() != now.keys():
                    return None
                if any(found.isdisjoint(known["weights"][name]) for name, found in now.items()):
                    return None
                tensors = tensor_file.read(file, header)
        except (FormatError, ValueError):  # damaged: it is made anew
            return None
        home = {name: view.weight.device for name, view in views.items()}
        return {
            name: Edit(
                mask=tensors[f"{name}.mask"].to(home[name]),
                value=tensors[f"{name}.value"].to(home[name]) if f"{name}.value" in tensors else None,
            )
            for name in views
        }

    @staticmethod
    def write(path: Path, key: str, decided: dict[str, tuple[View, Edit, Tensor]]) -> None:
        """Keep what was decided in a stage, in one step: by name the view, the edit, and the dense weight it makes."""
        tensors: dict[str, Tensor] = {}
        for name, (_, edit, _) in decided.items():
            tensors[f"{name}.mask"] = edit.mask
            if edit.value is not None:
                tensors[f"{name}.value"] = edit.value
        both = {name: [_digest_of(view), digest(result)] for name, (view, _, result) in decided.items()}
        tensor_file.write(path, tensors, {"sten_calibration": json.dumps({"key": key, "weights": both})})
