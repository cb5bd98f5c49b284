"""sten in transformers: folders of `save_pretrained`, and training by Trainer.

Importing this module (or `sten.sparsify` of a model of transformers) lets `from_pretrained` read folders with sparse
weights:

    import sten.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..calibration import Calibration
from ..conversion import attach, sparsify, summary, trainable
from ..conversion.arguments import Layouts, Weights
from ..conversion.recipe import DEFAULT, Recipe, recipe_of, recipes_of
from ..conversion.select import sparse_weights
from ..conversion.sites import sites_of
from ..sparsifiers import Sparsifier
from ..sparsifiers.allocation import Allocation
from ..training.engine import engines_of
from ..training.optimizer_checks import optimizers_of
from ..training.weights import dynamic_weights, trained_weights
from .pretrained import SparseConfig, SparseQuantizer

__all__ = ["SparseConfig", "SparseQuantizer", "SparsityCallback", "model_card"]


class SparsityCallback(TrainerCallback):
    """Makes the model of a Trainer sparse and trains it so; the arguments are those of `sten.sparsify`, or a Recipe.

    The model becomes sparse, in trainable form, when the Trainer is made: before it makes its optimizer, and before it
    loads a checkpoint. The method starts when training begins, in the optimizer that accelerate has wrapped. A
    checkpoint of the Trainer has all state of the method, and each is a folder for `from_pretrained`. Each log has
    `density`, that of the sparse weights, and `mask_updates`. Call `sten.finalize` when training has ended.

    `calibration` is that of `sten.sparsify`, for a method that reads activations; it is used once.

    Without arguments, a model that is sparse already is trained in its pattern, or by the method that it has. With a
    Recipe for another site than weights, or a model that has such sites, they act from the first step.

    Raises:
        ValueError, TypeError: what sparsify raises, when the Trainer is made; what `sten.attach` raises, an optimizer
            that cannot train such weights for one, before the first step.

    Example:
        >>> import sten
        >>> from sten.integrations.transformers import SparsityCallback
        >>> callback = SparsityCallback(sten.CSR(), sten.Gradual(start=10, stop=100), sparsity=0.8)
        >>> callback.recipe.sparsity  # Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
        0.8
    """

    def __init__(
        self,
        layout: Layouts | Recipe | None = None,
        sparsifier: Sparsifier | None = DEFAULT,
        sparsity: float | Allocation | None = None,
        weights: Weights = None,
        calibration: Calibration | Iterable | None = None,
    ) -> None:
        self.calibration = calibration
        given = layout is not None or sparsifier is not DEFAULT or sparsity is not None or weights is not None
        self.recipe = recipe_of(layout, sparsifier, sparsity, weights) if given else None
        if calibration is not None and not given:
            raise ValueError("Expected a method for SparsityCallback(calibration=...), got none; pass sparsifier=.")

    def on_init_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self._make_sparse(model, optimizer)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if not sparse_weights(model) and not sites_of(model):  # made by model_init, after the Trainer
            if args.world_size > 1 or state.global_step > 0:
                raise ValueError(
                    "Expected Trainer(model=...) for sten's SparsityCallback on several processes or from a "
                    "checkpoint, got model_init=, which makes a dense model anew; pass the model itself."
                )
            self._make_sparse(model, optimizer)
        weights, optimizers = dynamic_weights(model), optimizers_of(optimizer)
        if not sparse_weights(model):
            return  # sites alone: their tensors are the optimizer's already
        if not weights or not all(w.engine is not None and any(map(w.engine.acts_in, optimizers)) for w in weights):
            attach(model, optimizer)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs) -> None:
        weights = trained_weights(model)
        if not weights or logs is None:
            return
        active = sum(int(weight.active().sum()) for weight in weights)
        updates = sum(engine.updates for engine in engines_of(model))
        more = {"density": active / sum(weight.size for weight in weights), "mask_updates": updates}
        logs.update(more)
        state.log_history[-1].update(more)  # the Trainer has copied the logs into it already

    def _make_sparse(self, model: nn.Module, optimizer: Any) -> None:
        if self.recipe is not None and recipes_of(model)[-1:] != [self.recipe.record()]:
            of_weights = self.recipe.site == "weight"
            sparsify(model, self.recipe, optimizer=optimizer if of_weights else None, calibration=self.calibration)
        elif not sparse_weights(model) and not sites_of(model):
            raise ValueError("Expected a sparse model, or arguments for SparsityCallback, got neither; pass sparsity=.")
        if optimizer is None:
            trainable(model)


def model_card(model: nn.Module) -> str:
    """The text of a README.md for a folder of `save_pretrained`: tags, how to load it, and the table of its weights.

    Example:
        >>> import torch, sten
        >>> from sten.integrations.transformers import model_card
        >>> print(model_card(sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4))).splitlines()[1])
        library_name: transformers
    """
    kind = type(model).__name__
    recipes = "\n".join(f"- `{record}`" for record in recipes_of(model)) or "- not recorded"
    return f"""---
library_name: transformers
tags:
- sten
- sparse
---

# {kind} with sparse weights

```python
import sten.integrations.transformers
from transformers import {kind}

model = {kind}.from_pretrained("path or name of this folder")
```

Made sparse by sten (package sten-torch), with:

{recipes}

```
{summary(model).plain()}
```
"""
