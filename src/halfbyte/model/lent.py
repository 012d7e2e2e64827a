"""A model too large to hold, run all the same: every module has its parameters only while it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.load import skeleton
from halfbyte.model.read import weight_of
from halfbyte.model.source import Source
from halfbyte.nn import FrozenLinear

Weights = Callable[[str], Tensor]
"""A parameter's value by its name, of any float dtype."""


class LentModel:
    """Logits of an architecture under any set of weights, in float32; peak memory one tensor and the activations."""

    def __init__(self, source: Source) -> None:
        self.label = source.label
        self._model = skeleton(source).eval()
        self._alias: dict[str, str] = dict(self._model.all_tied_weights_keys)
        for name, module in list(self._model.named_modules()):
            if type(module) is nn.Linear:  # which wants weight and input of one dtype
                self._model.set_submodule(name, FrozenLinear(weight_of(module), module.bias))

    @property
    def model(self) -> PreTrainedModel:
        """The skeleton, for hooks."""
        return self._model

    def decoder_layers(self) -> nn.ModuleList:
        """One after the other.

        Raises:
            ModelError: the model has no list of them.
        """
        count = self._model.config.get_text_config().num_hidden_layers
        for module in self._model.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ModelError("has no list of decoder layers", where=self.label, fix="Merge with --format 16bit")

    def run(self, input_ids: Tensor) -> Tensor:
        """All but the output head, while weights are lent: the last hidden states (sequences, tokens, hidden size)."""
        hidden: Tensor = self._model.base_model(input_ids=input_ids, use_cache=False)[0]
        return hidden

    def logits_after(self, layers: Tensor, input_ids: Tensor) -> Tensor:
        """Logits (sequences, tokens, vocabulary) float32 of what the last decoder layer gave, while weights are lent.

        Args:
            layers: (sequences, tokens, hidden size), for `input_ids` (sequences, tokens).
        """
        with ExitStack() as undo:
            for layer in self.decoder_layers():
                vars(layer)["forward"] = lambda *args, **kwargs: layers
                undo.callback(vars(layer).pop, "forward")
            logits: Tensor = self._model(input_ids=input_ids, use_cache=False).logits.float()
        return logits

    @torch.no_grad()
    def logits(self, input_ids: Tensor, weights: Weights) -> Tensor:
        """(sequences, tokens) int64, padded at the end -> (sequences, tokens, vocabulary) float32.

        Raises:
            ModelError: the architecture reads a parameter outside the module that has it.
        """
        try:
            with self.lend(weights):
                logits: Tensor = self._model(input_ids=input_ids, use_cache=False).logits.float()
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error).lower():
                raise
            raise ModelError(
                "cannot be run module by module", where=self.label,
                why="a parameter is read outside the module that has it",
            ) from error  # fmt: skip
        return logits

    @contextmanager
    def lend(self, weights: Weights) -> Iterator[None]:
        """Inside the block the model may be called."""
        with ExitStack() as hooks:
            for name, module in self._model.named_modules():
                if next(module.parameters(recurse=False), None) is not None:
                    lend = module.register_forward_pre_hook(partial(self._lend, name, weights))
                    take = module.register_forward_hook(_take_back, always_call=True)
                    hooks.callback(lend.remove)
                    hooks.callback(take.remove)
            yield

    def _lend(self, module_name: str, weights: Weights, module: nn.Module, args: Any) -> None:
        keeps_dtype = isinstance(module, FrozenLinear | nn.Embedding)
        for leaf in list(module._parameters):
            if module._parameters[leaf] is None:
                continue
            name = f"{module_name}.{leaf}"
            value = weights(self._alias.get(name, name))
            if not (keeps_dtype and leaf == "weight"):
                value = value.float()
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _take_back(module: nn.Module, args: Any, output: Any) -> Any:
    for leaf, value in module._parameters.items():
        if value is not None:
            module._parameters[leaf] = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
    return output.float() if isinstance(module, nn.Embedding) else output
