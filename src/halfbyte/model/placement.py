"""Where the base's 4-bit bytes live: all in memory, mapped from their file, or read from it while they are used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.checkpoint.shards import SafetensorsFolder, TensorInfo
from halfbyte.model.source import TensorReader
from halfbyte.nn import Linear4bit
from halfbyte.nn.row_embedding import RowEmbedding
from halfbyte.nn.streamed import StreamedLayer
from halfbyte.store import Extent, LayerStore, Memory, RowStore, spread

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from halfbyte.store.sharded import ShardedStore

_LAYER = re.compile(r"(.*?\.\d+)\..+")
"""The decoder layer that a module belongs to: its name up to the first number."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What is asked for.

    Attributes:
        weights: "resident", "mmap" or "stream".
        resident_layers: of "stream", decoder layers that stay in memory all the same.
        ring: of "stream", buffers of the size of one layer.
        memory: of "stream", where layers compute: what the buffers lie in. The rest of the model is loaded into host
            memory, and follows with `model.to(device)`.
        host_budget: of "stream" to a device, bytes of host memory for copies of layers; the others come from the file.
    """

    weights: str = "resident"
    resident_layers: int = 0
    ring: int = 3
    memory: Memory = field(default_factory=Memory)
    host_budget: int = 0

    def streamed(self, targets: Iterable[str]) -> dict[str, list[str]]:
        """The decoder layers that are streamed, in order, with the modules of each among `targets`.

        Those that stay are spread evenly, so that there is time to read between any two.
        """
        layers: dict[str, list[str]] = {}
        for name in targets if self.weights == "stream" else ():
            found = _LAYER.fullmatch(name)
            if found:
                layers.setdefault(found[1], []).append(name)
        count = max(len(layers) - self.resident_layers, 0)
        names = list(layers)
        return {names[number]: layers[names[number]] for number in spread(count, len(names))}

    def row_table(self, model: PreTrainedModel, names: Mapping[str, str]) -> str:
        """The name of the embedding's weight if its rows are read one by one; empty if it stays in memory.

        It stays where the head is the same table, or the embedding does more than looking up.
        """
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        modules = {id(module): name for name, module in model.named_modules()}
        name = f"{modules.get(id(embedding), '')}.weight"
        stored = (
            name in names and f"{modules.get(id(head), '')}.weight" in names
        )  # a tied head has no tensor of its own
        return name if self.weights == "stream" and stored and type(embedding) is nn.Embedding else ""


RESIDENT = Placement()


def stream_layers(
    model: nn.Module, stored: TensorReader, layers: dict[str, list[str]], names: dict[str, str], placement: Placement
) -> LayerStore:
    """Have the modules of `layers` borrow codes and scales from the files of `stored`, a safetensors folder.

    Args:
        layers: modules by decoder layer, all Linear4bit.
        names: the stored name of each parameter.
    """
    assert isinstance(stored, SafetensorsFolder)
    extents = [
        [_extent(stored.tensors[name + key]) for module in modules for name in (names[f"{module}.weight"],)
         for key in ("", ".absmax")]
        for modules in layers.values()
    ]  # fmt: skip
    store = LayerStore(extents, placement.ring, placement.memory, placement.host_budget)
    for index, (layer, modules) in enumerate(layers.items()):
        StreamedLayer(store, index, [_linear4bit(model, name) for name in modules]).attach(model.get_submodule(layer))
    return store


def shard_layers(model: nn.Module, store: LayerStore, mesh: DeviceMesh) -> ShardedStore:
    """Have the layers of `model` that stream from `store` borrow from the ranks in `mesh`; each keeps a part."""
    from halfbyte.store.sharded import ShardedStore  # loads FSDP2

    def layers() -> Iterator[list[Tensor]]:
        for index in range(len(store.layers)):
            with store.use(index) as tensors:
                yield tensors

    sharded = ShardedStore(layers(), mesh)
    store.close()
    for module in model.modules():
        layer = getattr(module, "streamed", None)
        if isinstance(layer, StreamedLayer):
            layer.move_to(sharded)
    return sharded


def stream_rows(
    model: PreTrainedModel, stored: TensorReader, name: str, compute_dtype: torch.dtype, least: int, *,
    int8: bool,
) -> None:  # fmt: skip
    """Have the input embedding look up its rows in the tensor `name` of `stored`, a safetensors folder.

    Args:
        least: rows it has at least; those beyond the tensor's are zeros, in memory.
        int8: give them the values that they would have in int8.
    """
    assert isinstance(stored, SafetensorsFolder)
    info = stored.tensors[name]
    count, width = info.shape
    rows = RowStore(_extent(info), width * info.dtype.itemsize)
    model.set_input_embeddings(
        RowEmbedding(rows, max(count, least), width, info.dtype, compute_dtype, int8=int8, stored=count)
    )


def _extent(info: TensorInfo) -> Extent:
    return Extent(info.file, info.start, info.end)


def _linear4bit(model: nn.Module, name: str) -> Linear4bit:
    module = model.get_submodule(name)
    assert isinstance(module, Linear4bit)
    return module


def is_streamed(module: str, layers: dict[str, list[str]]) -> bool:
    """Whether `module` is one of those in `layers`."""
    return any(module in modules for modules in layers.values())
