"""The phases of a run, each with its fullest moment: load, train, evaluate, save, generate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from halfbyte.config import RunConfig
from halfbyte.dtypes import ITEMSIZE, parse_bytes
from halfbyte.plan import gpu, step, workspace
from halfbyte.plan.base import HEADS, Base
from halfbyte.plan.budget import on_gpu
from halfbyte.plan.layer import GROUPS, TEMPORARY, Sizes
from halfbyte.plan.ledger import Ledger, Moment
from halfbyte.plan.machine import TOKENIZER, Machine, default_runtime

BLOCK_ENDS = 2**21
"""What a layer's buffer holds beside its bytes: gaps that are read over, ends of blocks, a huge page's end."""
RING = 3
"""Buffers of a layer each (store/layers.py)."""
GATHERED = 3
"""Layers' bytes beside a rank's part of them: one in use, the next as it comes and as it lies (store/sharded.py)."""
MIN_EVAL_TOKENS = 2048
"""Of an evaluation batch, as train/loop.py takes them."""
LEAST_8BIT, STATE_BLOCK = 4096, 256
ANSWER_TOKENS, CACHE_STEP = 64, 256
LINEAR_NAMES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The most that goes through the model at once.

    Attributes:
        tokens: of a micro-batch.
        targets: supervised tokens among them.
        longest: tokens of the longest sample.
        runtime: resident bytes beside tensors; None: of `machine`.
    """

    tokens: int
    targets: int
    longest: int
    runtime: int | None = None


def worst_case(config: RunConfig) -> Work:
    """Where the data is not known: full packs, every token supervised."""
    tokens = config.train.micro_batch_size * config.data.max_seq_len
    return Work(tokens=tokens, targets=tokens, longest=config.data.max_seq_len)


def sizes(config: RunConfig, base: Base, machine: Machine, tokens: int) -> Sizes:
    """A layer's pass over `tokens` tokens."""
    dtype = compute_dtype(config, machine)
    # All micro-batches of a step pass a streamed layer before the next one is read.
    fused = runs_fused(config, base)
    together = config.train.gradient_accumulation_steps if apart(config) and fused else 1
    if not config.train.gradient_checkpointing:  # then a micro-batch keeps all that it computes
        tokens, together = tokens * together, 1
    wanted = config.lora.target_modules
    adapted = LINEAR_NAMES if wanted == "all-linear" else tuple(name.rpartition(".")[2] for name in wanted)
    embedding_rows, head_rows = trained_rows(config, base)
    return Sizes(
        arch=replace(base.architecture, fused=fused), tokens=tokens,
        itemsize=ITEMSIZE[dtype], rank=config.lora.r, adapted=frozenset(adapted),
        checkpoint=config.train.gradient_checkpointing or (apart(config) and not fused),
        pairs=dtype == "bfloat16" and machine.bf16_units, panel_rows=machine.panel_rows.get(dtype), together=together,
        offloaded=config.memory.activations == "disk", on_gpu=on_gpu(config, machine), dora=config.lora.use_dora,
        embedding_rows=embedding_rows, head_rows=head_rows,
    )  # fmt: skip


def apart(config: RunConfig) -> bool:
    """Whether a layer's bytes are whole in memory only while it computes: streamed, or sharded over ranks."""
    return config.memory.weights == "stream" or config.train.sharding == "full"


def runs_fused(config: RunConfig, base: Base) -> bool:
    """Whether the decoder layers run as one function each: the architecture's do, all in 4 bits, without dropout."""
    return base.architecture.fused and config.lora.dropout == 0 and not config.quant.skip_modules


def compute_dtype(config: RunConfig, machine: Machine) -> str:
    """What products run in."""
    if config.quant.compute_dtype != "auto":
        return config.quant.compute_dtype
    if on_gpu(config, machine):
        return "bfloat16" if machine.gpu is None else machine.gpu.compute_dtype
    return machine.compute_dtype


def speed_key(config: RunConfig, machine: Machine) -> str:
    """The name of `compute_dtype`'s speed in `machine.gflops`."""
    name = (machine.gpu.name if machine.gpu else "GPU") + " " if on_gpu(config, machine) else ""
    return name + compute_dtype(config, machine)


def adapter_parameters(s: Sizes) -> int:
    """r (in + out) of every adapted layer, and out with DoRA; and the trained rows of embedding and head."""
    return s.arch.layers * sum(s.adapter_bytes(group) for group in GROUPS) // 4 + sum(s.tables)


def trained_rows(config: RunConfig, base: Base) -> tuple[int, int]:
    """Of input embedding and output head, how many rows are trained. Every token is taken to be a new one."""
    lora, arch = config.lora, base.architecture
    tokens = len(lora.trainable_tokens)
    whole = {name.rpartition(".")[2] in HEADS for name in lora.modules_to_save}
    return tuple(arch.vocab + tokens if head in whole else tokens for head in (False, True))  # type: ignore[return-value]


def grown_bytes(config: RunConfig, base: Base) -> int:
    """Of embedding and head, rows for new tokens."""
    width = base.architecture.hidden * ITEMSIZE[base.embedding_dtype]
    return len(config.lora.trainable_tokens) * width * (1 if base.architecture.tied else 2)


def _row_squares(s: Sizes) -> int:
    """DoRA: of each adapted weight's rows, in float32."""
    return 4 * s.arch.layers * sum(s.stretched(group) for group in GROUPS)


def states_in_memory(config: RunConfig, s: Sizes, machine: Machine) -> int:
    """All of the optimizer's states that are this rank's, or of paged ones their budget."""
    states = state_bytes(s, config.optim.bits)
    if config.train.sharding == "full":  # no tensor's are cut
        states = max([states // machine.world, *(_states_of(count, config.optim.bits) for count in s.tables)])
    return min(states, parse_bytes(config.memory.optimizer_budget)) if config.optim.paged else states


def state_bytes(s: Sizes, bits: int) -> int:
    """Two moments a parameter: 4 bytes each, or 1 and a float32 scale for 256; small tensors stay in 32 bits."""
    layer = sum(_states_of(count, bits) for count in _adapter_sizes(s))
    return s.arch.layers * layer + sum(_states_of(count, bits) for count in s.tables)


def _states_of(count: int, bits: int) -> int:
    return 2 * (count + 4 * -(-count // STATE_BLOCK) if bits == 8 and count >= LEAST_8BIT else 4 * count)


def state_blocks(s: Sizes, bits: int) -> dict[int, int]:
    """How many blocks the states have, by their bits: what pages are filled with."""
    blocks = {8: 0, 32: 0}
    for count, times in [(count, s.arch.layers) for count in _adapter_sizes(s)] + [(count, 1) for count in s.tables]:
        blocks[8 if bits == 8 and count >= LEAST_8BIT else 32] += times * -(-count // STATE_BLOCK)
    return blocks


def _adapter_sizes(s: Sizes) -> list[int]:
    """Elements of each of a layer's adapter matrices."""
    return [
        count
        for group in GROUPS
        for name, out, into in s.members(group) if name in s.adapted
        for count in (s.rank * into, out * s.rank, *([out] if s.dora else []))
    ]  # fmt: skip


def phases(config: RunConfig, base: Base, machine: Machine, work: Work, *, history: bool = False) -> dict[str, Ledger]:
    """A ledger for each phase, in the order in which they come."""
    s = sizes(config, base, machine, work.tokens)
    found = {"load": static(config, base, machine, work)}
    found["load"].where = "load"
    found["load"].hold("load_slice", slice=0 if s.on_gpu else base.load_extra)
    if config.train.sharding == "full":  # layers come through the buffers of streamed ones
        found["load"].hold("stream_ring", ring=RING * layer_bytes(base))

    def with_adapter(tokens: int, *, backward: bool, keep_history: bool = False) -> tuple[Ledger, Sizes]:
        led = static(config, base, machine, work)
        own = replace(s, tokens=tokens)
        led.keep_history = keep_history
        led.hold("adapters", adapters=4 * adapter_parameters(own), row_squares=_row_squares(own))
        rows = min(step.chunk_rows(own), tokens)
        kept = workspace.largest(own, rows, machine.threads, backward=backward) if not own.on_gpu else gpu.WORKSPACE
        led.hold("workspace", workspace=kept)
        return led, own

    accumulates = config.train.gradient_accumulation_steps > 1
    led, own = with_adapter(work.tokens, backward=True, keep_history=history)
    led.hold("optimizer_states", states=states_in_memory(config, own, machine))
    if accumulates:
        led.hold("gradients", gradients=4 * adapter_parameters(own))
    targets = max(work.targets, 1)
    step.train(led, step.Pass(base=base, sizes=own, targets=targets, accumulate=accumulates))
    if machine.world > 1 and own.tables:  # a copy of one at a time is summed over ranks
        led.where = "sum of gradients"
        led.hold(TEMPORARY, summed=4 * max(own.tables))
    found["train"] = led
    after_step = states_in_memory(config, own, machine)
    if config.data.eval:
        tokens = max(config.train.micro_batch_size * config.data.max_seq_len, MIN_EVAL_TOKENS, work.longest)
        led, own = with_adapter(tokens, backward=False)
        led.hold("optimizer_states", states=after_step)
        step.evaluate(led, step.Pass(base=base, sizes=own, targets=tokens))
        found["evaluate"] = led
    led, own = with_adapter(1, backward=False)
    led.where = "save"
    led.hold("optimizer_states", states=after_step)
    if config.train.sharding == "full":  # all ranks' together, for the checkpoint
        led.hold("optimizer_states", collected=state_bytes(own, config.optim.bits))
    found["save"] = led
    if config.data.eval and not apart(config):
        found["generate"] = _generate(with_adapter(work.longest, backward=False), base, work, after_step)
    for led in found.values() if s.on_gpu else ():
        led.peak = _with_allocator(led.peak)
    return found


def _with_allocator(moment: Moment) -> Moment:
    """On a GPU: and what torch's allocator takes beside the tensors."""
    tensors = moment.total - moment.terms["runtime"]
    share = tensors // gpu.ALLOCATOR_SHARE + gpu.ALLOCATOR_LEAST
    return replace(moment, terms={**moment.terms, "allocator": share})


def layer_bytes(base: Base) -> int:
    """What a streamed layer takes in a buffer: codes and scales, read in whole blocks of the disk."""
    return base.layer + BLOCK_ENDS


def runtime_bytes(base: Base, machine: Machine) -> int:
    """Python, libraries and tokenizer, where it is not known what they take in this process."""
    return (machine.runtime or default_runtime()) + tokenizer_bytes(base)


def tokenizer_bytes(base: Base) -> int:
    """Of the tokenizer in memory."""
    return int(TOKENIZER * (base.tokenizer_file or 0))


def static(config: RunConfig, base: Base, machine: Machine, work: Work) -> Ledger:
    """What is held all the time: Python, libraries and the base."""
    led = Ledger()
    runtime = gpu.CONTEXT if on_gpu(config, machine) else runtime_bytes(base, machine)
    led.hold("runtime", runtime=runtime if work.runtime is None else work.runtime)
    if config.memory.weights == "stream":
        layer = layer_bytes(base)
        kept = min(config.memory.resident_layers, base.architecture.layers)
        led.hold("linears_4bit", linears=base.nested + kept * layer)
        led.hold("stream_ring", ring=RING * layer)
    elif config.train.sharding == "full":
        led.hold("linears_4bit", linears=base.nested + -(-(base.linears - base.nested) // machine.world))
        led.hold("gathered_layers", gathered=GATHERED * layer_bytes(base))
    else:
        led.hold("linears_4bit", linears=base.linears)
    by_rows = apart(config) and not base.architecture.tied
    led.hold("embeddings", embeddings=0 if by_rows else base.embeddings, grown=grown_bytes(config, base))
    led.hold("head", head=base.head)
    led.hold("norms_and_other", other=base.other)
    return led


def _generate(started: tuple[Ledger, Sizes], base: Base, work: Work, states: int) -> Ledger:
    """A prompt through the layers, its keys and values in transformers' cache and in ours, with room to grow."""
    led, s = started
    led.where = "answers"
    led.hold("optimizer_states", states=states)
    arch = base.architecture
    room = -(-(work.longest + ANSWER_TOKENS) // CACHE_STEP) * CACHE_STEP
    cache = 2 * arch.layers * arch.key * s.itemsize
    led.hold("kv_cache", prompt=cache * work.longest, room=cache * int(1.5 * room), turns=8 * arch.head_dim * room)
    step.evaluate(led, step.Pass(base=base, sizes=s, targets=1))
    return led


def fullest(found: dict[str, Ledger]) -> tuple[str, Moment]:
    """The phase that takes most, and its moment."""
    name = max(found, key=lambda phase: found[phase].peak.total)
    return name, found[name].peak
