"""What a forward leaves in memory for its backward, layer by layer. No torch.

Every figure is of a whole micro-batch, in bytes, and was read off torch's own allocator
(`tests/benchmarks/memory.py`). B micro-batch, T tokens of a sequence, H hidden, D a width of all
heads, C columns, v bytes of a value (2 in bf16, 4 in fp32).

A token keeps

- of a norm what went into it, the normalised values and what came out. A `LayerNorm` is one kernel,
  and a compiled layer computes norms anew: 2 v H + 8. An RMSNorm is written out in the library:
  12 H in fp32; in bf16 the float32 copy of what went in, and two bf16 values: 8 H (of T5's, which
  reads its input in bf16 too, 10 H);
- of an attention q, k, v and the result, and 4 a head for the fused kernel's sums;
- of an MLP what its activation function keeps of a column (ACTIVATION), the result, and if gated
  the other factor and the product; compiled, what its projections return and the last one reads;
- of a state-space mixer what `est_ds/cost/state_space.py` says.

Attention that is written out (T5's, whose bias is trained; with dropout on a CPU) keeps q, k and v
in float32 and T x T weights of every head, with dropout thrice. A slice of a weight is a copy, and
the backward needs it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from est_ds.config.run_config import RunConfig
from est_ds.cost.documents import by_document, of_weights, window_of
from est_ds.cost.flops import StepSize
from est_ds.cost.state_space import kept_bytes, kept_of_scan
from est_ds.plans.methods.base import Load
from est_ds.plans.shape import Attention, Mlp, ModelShape, Part, StateSpace

# Values of a column that an activation function keeps for its backward, its result aside: its
# input; GELU written out by tanh (GPT-2's and T5's) also half of it, the tanh, and one more.
ACTIVATION = {"relu": 0.0, "gelu_new": 4.0}
WRITTEN_OUT_GELU = ("gelu_new", "gelu_fast", "gelu_python_tanh")
FIELDS_OF_ACTIVATION = ("hidden_act", "activation_function", "feed_forward_proj", "dense_act_fn")
DEFAULT_ACTIVATION = {"gpt2": "gelu_new", "bert": "gelu", "t5": "relu"}
LAYER_NORM = ("gpt2", "bert")
# Logits that the loss takes at a time; a GPU would have too little to do with those that fit into a
# CPU's cache. Fewer rows than the fewest would spend their time on adding to the weight's gradient.
LOGITS_AT_ONCE, LOGITS_AT_ONCE_ON_GPU, FEWEST_ROWS = 1 << 22, 1 << 27, 256


@dataclass(frozen=True)
class Setting:
    """How the layers compute.

    Attributes:
        value_bytes: of a value: 2 or 4.
        activation: the library's name of the MLPs' function.
        dropout: what layers return is dropped.
        attention_dropout: so are weights of attention.
        on_gpu: kernels of a GPU: attention with dropout is fused, and a mask is a byte a value.
        has_mask: attention has one: documents are kept apart by it, or there is a window.
        by_document: attention is computed document by document, on a CPU one call after the other.
        compiled: layers are compiled, which computes norms and activation functions anew.
        logits_at_once: logits that the loss takes at a time; None: all.
    """

    value_bytes: int
    activation: str = "silu"
    dropout: bool = False
    attention_dropout: bool = False
    on_gpu: bool = False
    has_mask: bool = False
    by_document: bool = False
    compiled: bool = False
    logits_at_once: int | None = None

    @property
    def dropped_bytes(self) -> int:
        """Of a value's mask."""
        return 0 if not self.dropout else 1 if self.on_gpu else self.value_bytes


@dataclass(frozen=True)
class Kept:
    """Bytes of one micro-batch.

    Attributes:
        layers: kept for the backward, of every layer, by its chance.
        whole: the same of a layer that is computed.
        inputs: of what goes into every layer.
        working: what the backward of every layer adds to that at most.
        ends: kept by the embedding, and by what comes behind the last layer.
        loss: of the logits.
    """

    layers: list[float]
    whole: list[float]
    inputs: list[float]
    working: list[float]
    ends: tuple[float, float]
    loss: LossBytes


@dataclass(frozen=True)
class LossBytes:
    """What output head and loss take beside what is kept of the layers.

    Attributes:
        most: at the most.
        backward: in the head's backward, the gradient of its weight aside.
        output: of what the model returns.
    """

    most: float
    backward: float
    output: float


def loss_bytes(
    tokens: float, shape: ModelShape, value_bytes: int, at_once: int | None
) -> LossBytes:
    """What head and loss take.

    All logits at once: at the start of the backward three times as many values of 4 bytes
    (log-probabilities, and the gradients before and behind them). Some rows at a time: their logits
    twice in float32 and what is left of the rows before, and from the forward on the gradients of
    what the head reads and of its weight.

    Args:
        at_once: logits that are there at a time; None: all.
    """
    hidden, vocabulary = shape.hidden, shape.vocabulary
    if at_once is None:
        logits = tokens * vocabulary
        return LossBytes(
            12 * logits, value_bytes * (logits + tokens * hidden), value_bytes * logits
        )
    rows = max(FEWEST_ROWS, at_once // vocabulary)
    several = rows < tokens
    weight = hidden * vocabulary * (4 if several else value_bytes)
    read = value_bytes * tokens * hidden
    a_logit = (12 if value_bytes == 4 else 14) if several else 8
    summed = weight if several and value_bytes == 2 else 0  # copied, not handed on
    return LossBytes(a_logit * min(rows, tokens) * vocabulary + read + weight, read + summed, 0.0)


def setting_of(
    config: RunConfig,
    shape: ModelShape,
    *,
    dropout: Mapping[str, float],
    on_gpu: bool,
    whole_logits: bool = False,
) -> Setting:
    """How the layers of a run compute.

    Args:
        whole_logits: the objective's loss reads them.
        dropout: the model's fields that drop something, with their chances.
    """
    model, family = config.model, shape.family
    named = [str(model[field]) for field in FIELDS_OF_ACTIVATION if model.get(field)]
    activation = named[0] if named else DEFAULT_ACTIVATION.get(family, "silu")
    activation = activation.removeprefix("gated-")
    if family == "t5" and activation == "gelu":
        activation = "gelu_new"  # as the library reads `gated-gelu`
    apart = by_document(config, shape, dropout, on_gpu)
    separate, window = config.data.documents == "separate", window_of(config, family)
    at_once = LOGITS_AT_ONCE_ON_GPU if on_gpu else LOGITS_AT_ONCE
    return Setting(
        value_bytes=2 if config.precision == "bf16" else 4,
        activation=activation,
        dropout=bool(set(dropout) - of_weights(dropout)) or "dropout_rate" in dropout,
        attention_dropout=bool(of_weights(dropout)),
        on_gpu=on_gpu,
        has_mask=not apart and (separate or window is not None),
        by_document=apart,
        compiled=config.compile,
        logits_at_once=None if whole_logits else at_once,
    )


def activations(shape: ModelShape, loads: Sequence[Load], size: StepSize, setting: Setting) -> Kept:
    """What is kept of a forward of what `loads` keep of the layers.

    Args:
        size: of a micro-batch.
    """
    source, target = size.source, size.target if shape.encoder_layers else size.source
    value, norm = setting.value_bytes, norm_bytes(shape.family, setting)
    whole, inputs, working = [], [], []
    for i, (parts, load) in enumerate(zip(shape.layers, loads, strict=True)):
        stream = source if i < shape.encoder_layers else target
        kept, most = 0.0, 0.0
        for part, units, groups in zip(parts, load.units, load.key_value_groups, strict=True):
            passing = stream[0] * load.positions
            found = passing * (norm * part.hidden + 8 + setting.dropped_bytes * part.hidden)
            if isinstance(part, Attention):
                keys = (source if part.cross else stream)[0] * load.positions
                length = (source if part.cross else stream)[1] * load.positions
                found += _attention(shape, part, (units, groups), (passing, keys, length), setting)
            elif isinstance(part, StateSpace):
                share = units / part.columns
                found += passing * share * kept_bytes(part, value)
                found += passing * share * kept_of_scan(part, stream[1], value)
            else:
                found += passing * units * value * _columns(part, setting)
            kept += found + value * _sliced(part, units, groups)
            most = max(most, passing * working_bytes(part, units, value))
        whole.append(kept)
        inputs.append(load.probability * stream[0] * part.hidden * value)
        working.append(most if load.probability else 0.0)
    hidden = shape.hidden
    behind = target[0] * hidden * (norm + (2 * value if shape.head_inner else 0))
    before = source[0] * hidden * (norm if shape.family == "bert" else value) + 8 * source[0]
    if setting.has_mask:
        before += source[0] * source[1] * (1 + value)
    loss = loss_bytes(target[0], shape, value, setting.logits_at_once)
    layers = [load.probability * bytes_ for load, bytes_ in zip(loads, whole)]
    return Kept(layers, whole, inputs, working, (before, behind), loss)


def norm_bytes(family: str, setting: Setting) -> float:
    """Bytes that a norm keeps of every value that goes into it, the input included."""
    if family in LAYER_NORM or setting.compiled:
        return 2 * setting.value_bytes
    if setting.value_bytes == 4:
        return 12
    return 10 if family == "t5" else 8


def _attention(
    shape: ModelShape,
    part: Attention,
    kept: tuple[float, float],
    tokens: tuple[float, float, float],
    setting: Setting,
) -> float:
    """Bytes of q, k, v, the result and the weights.

    Args:
        kept: heads, and key/value heads.
        tokens: of the queries, of the keys, and of a sequence of keys.
    """
    (heads, groups), (queries, keys, length), value = kept, tokens, setting.value_bytes
    width = part.head_dim
    drops = setting.attention_dropout and not setting.on_gpu
    if drops or (shape.family == "t5" and not part.cross):
        of_three = 4 * width * heads * (queries + 2 * keys)
        weights = 4 * heads * queries * length * (3 if drops else 1)
        return of_three + value * width * heads * queries + weights
    if setting.has_mask:
        groups = heads  # they are repeated
    extra = 0.0
    if shape.family == "qwen3":  # norms of queries and keys
        extra = (12 - value if value == 4 else 6) * width * (queries * heads + keys * groups)
    if setting.by_document and not setting.on_gpu:
        extra += value * width * heads * queries  # results of calls, and what they are joined to
    return value * width * (2 * heads * queries + 2 * groups * keys) + 4 * heads * queries + extra


def _columns(part: Mlp, setting: Setting) -> float:
    """Values of a column that a token keeps."""
    if setting.compiled:  # what its projections return, and what goes into the last one
        return part.matrices
    name = "gelu_new" if setting.activation in WRITTEN_OUT_GELU else setting.activation
    return ACTIVATION.get(name, 1.0) + (3 if part.matrices == 3 else 1)


def working_bytes(part: Part, units: float, value_bytes: int) -> float:
    """Bytes of a token that the backward of a part adds: gradients of the columns, less what it has
    freed, and of what goes in; or those of its norm, which is computed in float32."""
    if isinstance(part, StateSpace):
        channels = units * part.width
        if part.chunk is None:  # a gradient of all states for every position that is selected
            return 12 * channels * part.state + 2 * value_bytes * channels
        return 20 * channels + value_bytes * part.hidden
    norm = 5 * 4 * part.hidden
    if isinstance(part, Attention):
        return max(norm, value_bytes * (part.hidden + 3 * units * part.head_dim))
    return max(norm, value_bytes * (part.hidden + 2 * units))


def _sliced(part: Part, units: float, groups: float) -> float:
    """Weights of which a part has copies, since it keeps some of its units."""
    if units >= part.units or not units:
        return 0.0
    if isinstance(part, Attention):
        whole = groups >= part.key_value_groups
        return 2 * part.hidden * part.head_dim * (units + (0.0 if whole else groups))
    if isinstance(part, StateSpace):
        return 3 * part.hidden * units * part.width
    return part.hidden * part.matrices * units
