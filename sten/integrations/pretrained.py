"""Folders of transformers: `save_pretrained` and `from_pretrained` of models with sparse weights, or with sites.

transformers reads and writes weights that are no plain tensors through a registered quantizer, which is what sten is to
it. config.json says so in its entry "quantization_config", and the metadata of each file describes the sparse weights
and the sites, as the header of `sten.save` does. All that is read goes through the same checks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import io, tensor_file
from ..checked import layout_of_file
from ..conversion import densify
from ..conversion.pretrained import KEY, pretrained_state
from ..conversion.recipe import recipes_of, set_recipes
from ..conversion.select import movable_weights
from ..conversion.site_files import change_of_sites, described_sites
from ..conversion.state_dict_hooks import accept_every_form, finalized_state
from ..errors import FormatError
from ..training.attribute import SUFFIX, read_every_finalized
from ..training.distributed import sharded

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"Expected transformers >= 5, got {transformers.__version__}; pip install -U transformers.")

from transformers.core_model_loading import ConversionOps, WeightConverter

METHOD = "sten"
VERSION = 1


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """The entry "quantization_config" of a config.json.

    Attributes:
        recipes: a record of what was done (`sten.Recipe`); nothing is made of it.
    """

    def __init__(self, version: Any = VERSION, recipes: Any = (), quant_method: str = METHOD) -> None:
        self.quant_method, self.version = quant_method, version
        if type(version) is not int or not 1 <= version <= VERSION:
            raise FormatError(f"Expected version {VERSION} of sten's entry in config.json, got {version}; update sten.")
        if not isinstance(recipes, (list, tuple)):
            raise FormatError(f"Expected a list of recipes in config.json, got {str(recipes)[:200]}.")
        self.recipes = list(recipes)

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any):
        unknown = sorted(config_dict.keys() - {"recipes", "version", "quant_method"})
        if unknown:
            raise FormatError(f"Expected no other entries of sten's in config.json, got {unknown}; update sten.")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Reads and writes the sparse weights and the sites of a model.

    Attributes:
        weights: name -> the description of each sparse weight in the files that are read.
        loaded: the names of the weights that were read.
        problems: what was wrong with the others: transformers would go on with random weights.
    """

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "Expected a folder with sparse weights for this quantization_config, got one without; leave it out, "
                "and call sten.sparsify on the loaded model."
            )
        self.weights: dict[str, dict[str, Any]] = {}
        self.loaded: set[str] = set()
        self.problems: list[FormatError] = []

    is_trainable = is_qat_trainable = is_compileable = True

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    # writing

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        shard = next((name for name, p in model.named_parameters() if sharded(p)), None)
        if shard is not None:  # one rank alone asks, and gathering needs all
            raise ValueError(
                f"Expected whole parameters for save_pretrained, got {shard} in shards; save the shards with "
                "torch.distributed.checkpoint, and load them into a model on one process."
            )
        movable_weights(model)  # raises for adapters, whose names from_pretrained would not find
        tensors, sparse = pretrained_state(model, finalized_state(model))
        weights = {name: {**io.description(w), "values": list(w.parts["values"].shape)} for name, w in sparse.items()}
        model.config.quantization_config = SparseConfig(recipes=recipes_of(model))
        model.add_model_tags(["sten", "sparse"])  # of the card that push_to_hub writes
        header = {"version": io.VERSION, "sparse": weights, "ties": {}, "sites": described_sites(model)}
        return tensors, {KEY: json.dumps(header)}

    # reading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("Expected a device_map without 'disk' for sparse weights, got one; use 'cpu' instead.")

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return super().get_new_dtype(None, param, dtype)  # also of a weight that is assembled

    def get_weight_conversions(self) -> list[WeightConverter]:
        parts: dict[str, set[str]] = {}
        for name, entry in self.weights.items():
            layout = layout_of_file(entry["layout"], entry["fields"])
            parts.setdefault(name.rpartition(".")[2], set()).update(layout.pattern)
        longest = sorted(parts, key=len, reverse=True)  # `in_proj_weight` ends like `weight`
        return [
            WeightConverter([name, *(f"{name}{SUFFIX}.{part}" for part in sorted(parts[name]))], name, [Assemble(self)])
            for name in longest
        ]

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs: Any) -> None:
        self.weights, sites, names = _descriptions(checkpoint_files or ())
        self._give_sites(model, sites, names)
        known = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*known, rf"{SUFFIX}\."}  # the state of a run

    def _give_sites(self, model: nn.Module, entries: list[dict[str, Any]], names: set[str]) -> None:
        """Give a model without numbers, before transformers reads them, the sites of the files, as far as it has the
        modules; their tensors are read as any others."""
        modules, own = dict(model.named_modules(remove_duplicate=False)), []
        for entry in entries:
            found = next((path for path in self.other_names(model, entry["module"]) if path in modules), None)
            if found is not None:
                own.append({**entry, "module": found})
        change = change_of_sites(model, own, {})
        for name in change.new_names:
            if names.isdisjoint(self.other_names(model, name)):
                raise FormatError(f"Expected {name}, which a site has learned, in the files of the folder, got none.")
        change.install()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        del model._keys_to_ignore_on_load_unexpected
        own_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in self.weights:
            own = [other for other in self.other_names(model, name) if other in own_names]
            if own and not self.loaded.intersection(own):
                self.problems.append(FormatError(f"Expected {name} in the files of the folder, got none."))
        if self.problems:
            raise self.problems[0]
        kept = [c for c in model._weight_conversions if not any(isinstance(op, Assemble) for op in _operations(c))]
        model._weight_conversions = kept  # what save_pretrained undoes
        del model.is_quantized, model.quantization_method  # `model.half()` and the like work
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                module.config._is_quantized = False
        set_recipes(model, self.quantization_config.recipes)
        read_every_finalized(model)
        accept_every_form(model)
        return model

    def other_names(self, model: nn.Module, name: str) -> tuple[str, ...]:
        """A weight's name in the model and in the files, one of which may be a part of the other."""
        prefix = model.base_model_prefix + "."
        return name, name.removeprefix(prefix), prefix + name

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return densify(model).to(dtype)


def _descriptions(files: Iterable[str | os.PathLike]) -> tuple[dict[str, dict[str, Any]], list, set[str]]:
    """What the files say of their sparse weights and of their sites, and the names of all tensors in them; FormatError
    if it is damaged, missing, or not the same in all."""
    found: dict[str, str | os.PathLike] = {}
    names: set[str] = set()
    for path in files:
        with tensor_file.open_file(path) as file:
            header = tensor_file.read_header(file)
        names |= header.tensors.keys()
        if KEY in header.metadata:
            found[header.metadata[KEY]] = path
    if not found and not any(f"{SUFFIX}." in name for name in names):
        return {}, [], names  # a dense model with the configuration of a sparse one
    if len(found) != 1:
        raise FormatError(
            f"Expected the files of one model with a description of its sparse weights, got {len(found)} descriptions; "
            "call sten.finalize on the whole model before save_pretrained."
        )
    ((text, path),) = found.items()
    header = io.header_of(text, path)
    weights = header["sparse"]
    io.expect_descriptions({name: {**entry, "shape": entry.get("values")} for name, entry in weights.items()})
    return weights, header.get("sites", []), names


class Assemble(ConversionOps):
    """Makes one weight of its parts, checked; a dense one passes."""

    def __init__(self, hf_quantizer: SparseQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> Assemble:
        return self  # transformers copies it for each weight

    def convert(self, input_dict: dict[str, Any], source_patterns, target_patterns, full_layer_name, model, **kwargs):
        read = {key.rpartition(".")[2]: tensors[0] for key, tensors in input_dict.items()}
        values = read.pop(target_patterns[0], None)
        weights, names = self.hf_quantizer.weights, self.hf_quantizer.other_names
        entry = next((weights[name] for name in names(model, full_layer_name) if name in weights), None)
        if entry is None and not read:
            return {full_layer_name: values}
        present = model.get_parameter(full_layer_name)
        try:
            weight = self._weight(full_layer_name, present, entry, values, read)
        except FormatError as error:  # which transformers would put into its report; raised when all is read
            self.hf_quantizer.problems.append(error)
            return {}
        self.hf_quantizer.loaded.add(full_layer_name)
        return {full_layer_name: nn.Parameter(weight, requires_grad=present.requires_grad)}

    def _weight(
        self, name: str, present: Tensor, entry: dict | None, values: Tensor | None, pattern: dict[str, Tensor]
    ):
        if entry is None:
            raise FormatError(f"Expected a description of {name} in the files, got a pattern without one.")
        if values is None or values.numel() != math.prod(entry["values"]):
            got = "none" if values is None else f"shape {tuple(values.shape)}"
            raise FormatError(f"{name}: Expected values of shape {tuple(entry['values'])} in the files, got {got}.")
        if sharded(present):
            raise FormatError(
                f"Expected a whole parameter for {name}, got one in shards; load the model, then shard it."
            )
        own = {key: part.clone() for key, part in pattern.items()}  # not pages of a file, which could change
        weight = io.described(name, entry, {"values": values.view(entry["values"]), **own})
        if weight.shape != present.shape:
            raise FormatError(
                f"Expected shape {tuple(present.shape)} for {name}, got {tuple(weight.shape)} in the file."
            )
        return weight


def _operations(conversion: Any) -> list:
    return getattr(conversion, "operations", [])


def note(model: nn.Module, has_sparse: bool) -> None:
    """Set or take away what `save_pretrained` asks for the state to write, and what config.json says of it.

    Models around this one share its configuration: what they write without being noted is refused when it is read.
    """
    current, known = vars(model).get("hf_quantizer"), getattr(model.config, "quantization_config", None)
    if has_sparse and current is None and known is None:
        model.config.quantization_config = SparseConfig()
    if has_sparse and current is None:
        model.hf_quantizer = SparseQuantizer(SparseConfig())
    if not has_sparse and isinstance(current, SparseQuantizer):
        del model.hf_quantizer
        if isinstance(known, SparseConfig):
            del model.config.quantization_config
