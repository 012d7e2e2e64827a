"""What the tensors of a model are called: in transformers, and in files."""

from __future__ import annotations

from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.experts import by_new_name, joined_weights
from halfbyte.model.source import TensorReader

OTHER_HEADS = "Train one with another head from Python, by from_pretrained with HalfbyteConfig (docs/tools.md)"


def match_names(model: PreTrainedModel, reader: TensorReader, path: str) -> dict[str, str]:
    """The stored name of each parameter of `model`, tied ones left out.

    Raises:
        ModelError: a parameter is not stored, or a stored tensor has no place, listing the first five.
    """
    stored = reader.names()
    available = by_new_name(model, stored)
    tied = set(model.all_tied_weights_keys)
    prefix = model.base_model_prefix + "."
    wanted = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in tied]
    names, missing = {}, []
    for name in wanted:
        found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in available), None)
        if found is None:
            missing.append(name)
        else:
            names[name] = available[found]
    joined = [name for name in joined_weights(model) if name in available]
    if joined:
        raise ModelError(
            f"stores all experts of a layer in one tensor, first {joined[0]}", where=path,
            why="only files that have one for each expert are read",
            fix="Load it by from_pretrained(..., quantization_config=HalfbyteConfig()), save it, and give that folder",
        )  # fmt: skip
    if missing:
        stored, read_as = model.config.architectures or [""], type(model).__name__
        other = stored[0] not in ("", read_as)  # the head of an encoder, say, has other tensors
        raise ModelError(
            f"{len(missing)} of {len(wanted)} tensors are missing, first {', '.join(missing[:5])}", where=path,
            why=f"it is a {stored[0]} and was read as a {read_as}, a causal language model" if other else "",
            fix=OTHER_HEADS if other else "Check that config.json and the weights belong together",
        )  # fmt: skip
    used = set(names.values())
    ignored = tied | {prefix + n for n in tied} | {n.removeprefix(prefix) for n in tied}
    buffers = {name for name, _ in model.named_buffers()}
    accounted = used | ignored | buffers
    extra = [
        n for n in stored
        if n not in accounted and n.partition(".weight.")[0] + ".weight" not in used
        and not n.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))
    ]  # fmt: skip
    if extra:
        raise ModelError(
            f"{len(extra)} tensors have no place in the model, first {', '.join(extra[:5])}", where=path,
            fix="Check that config.json and the weights belong together",
        )  # fmt: skip
    return names


def file_name(model: PreTrainedModel, name: str, stored: str) -> str:
    """What a file that is written calls parameter `name`, which `stored` is the name of in the file that was read: as
    transformers does, but for what it renames when it reads a file."""
    prefix = model.base_model_prefix + "."
    return name if name.removeprefix(prefix) == stored.removeprefix(prefix) else stored
