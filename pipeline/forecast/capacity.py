"""What a model needs of GPUs: does it fit, how many rows at once, and how fast at the very best.

Arithmetic on the model's config.json and on data sheets; nothing is started or measured. What it
leaves out: tensor parallel traffic (on a step of 16k tokens of A.X 3.1, TP2 adds about 72 ms to
547 ms of matrix products, TP4 about 107 ms to 273 ms), scheduling, sampling, and the ends of a job.
`Floor.realistic` is meant to cover these. Parameters other than the matrices (norms, biases) and
the scales of quantised weights are not counted: under 0.1% and 3%.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pipeline.config.model import MAX_NUM_SEQS
from pipeline.errors import ModelError
from pipeline.forecast.gpus import Gpu
from pipeline.model import context_in

OVERHEAD = 4.0e9
"""Bytes of a GPU for activations, CUDA graphs and NCCL. Chosen, not measured: vLLM's own profile
run decides, and has more for a larger `max_num_batched_tokens`."""

REALISTIC_MFU = 0.5
"""Share of the peak FLOP/s. Serious systems reach 43 to 46% offline on short rows."""

REALISTIC_BANDWIDTH = 0.8
"""Share of the memory's peak bandwidth that reading weights and KV cache reaches."""

UTILIZATION = 0.92
"""vLLM's default of gpu_memory_utilization (0.32)."""

NOT_COMPUTED = "Only its capacity and floor stay unknown; the job itself is not affected."


class Precision(NamedTuple):
    """How the matrices of the layers are held. Embeddings and lm_head stay in the dtype."""

    bytes_per_weight: float
    computes_fp8: bool = False
    """Whether activations are fp8 too, so that an fp8 GPU computes at twice the speed."""


FP8 = Precision(1.0, computes_fp8=True)
ONLINE_FP8 = ("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
"""Values of `quantization` by which vLLM makes fp8 of a 16-bit checkpoint's dense layers."""

DTYPE_BYTES = {"float": 4.0, "float32": 4.0}
"""By `dtype`; others have 2. So has `auto`: vLLM runs a checkpoint in float32 as 16 bit."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder shaped as Llama: q, k, v, o attention and a gate, up, down MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    """Tokens, see `context_in`."""
    is_tied: bool = False
    """One matrix for embeddings and lm_head."""
    precision: Precision | None = None
    """Of a quantised checkpoint; None: the layers are in the dtype."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a Hugging Face config.json. Raises ModelError if it describes another shape."""
        _check_shape(config)
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            context=context_in(config) or config["max_position_embeddings"],
            is_tied=bool(config.get("tie_word_embeddings", False)),
            precision=_checkpoint_precision(config.get("quantization_config")),
        )

    @property
    def block_weights(self) -> int:
        """Parameters of the layers' matrices; 32.99e9 for A.X 3.1."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding_weights(self) -> int:
        """Parameters of embeddings and lm_head together."""
        return self.vocab * self.hidden * (1 if self.is_tied else 2)

    @property
    def parameters(self) -> int:
        """34.67e9 for A.X 3.1."""
        return self.block_weights + self.embedding_weights

    def weight_bytes(self, dtype_bytes: float = 2.0, precision: Precision | None = None) -> float:
        """Of all weights together; `precision` is the layers' where it isn't the dtype."""
        block_bytes = precision.bytes_per_weight if precision else dtype_bytes
        return self.block_weights * block_bytes + self.embedding_weights * dtype_bytes

    def kv_bytes_per_token(self, value_bytes: float = 2.0) -> float:
        """Of all layers and heads; 196,608 for A.X 3.1 in bf16, 524,288 for Light."""
        return 2 * self.layers * self.kv_heads * self.head_dim * value_bytes

    @property
    def flops_per_token(self) -> int:
        """Of the layers' matrices: a multiplication and an addition for each weight."""
        return 2 * self.block_weights

    @property
    def flops_per_sampled_token(self) -> int:
        """Of the lm_head, on top."""
        return 2 * self.vocab * self.hidden

    @property
    def attention_flops(self) -> int:
        """For each token and each token of its context: scores, and the sum of the values."""
        return 4 * self.layers * self.heads * self.head_dim


@dataclass(frozen=True)
class Fit:
    """How one replica fills its GPUs. Bytes are of one GPU."""

    world: int
    """GPUs of a replica."""
    stages: int
    """Of them in a row (pipeline parallel)."""
    weights: float
    kv_cache: float
    """Left for the KV cache; negative where not even the weights fit."""
    kv_bytes_per_token: float
    """Also of one GPU: its layers and its heads. With more tensor parallel ranks than KV heads
    these are held several times over."""
    max_num_seqs: int
    max_model_len: int
    """Tokens; 0 where vLLM takes what fits (`auto`)."""
    computes_fp8: bool

    @property
    def fits(self) -> bool:
        return self.kv_tokens > 0

    @property
    def starts(self) -> bool:
        """vLLM refuses to start unless the KV cache holds one row of max_model_len."""
        return self.fits and self.kv_tokens >= self.max_model_len

    @property
    def kv_tokens(self) -> int:
        """Of one replica."""
        return max(0, int(self.kv_cache / self.kv_bytes_per_token))

    def rows_held(self, tokens_per_row: float) -> int:
        """Rows of so many tokens, prompt and answer, whose KV cache one replica holds."""
        return int(self.kv_tokens / max(1.0, tokens_per_row))

    def rows_at_once(self, tokens_per_row: float) -> int:
        """`rows_held`, at most max_num_seqs; one at least if vLLM starts, as none is longer than
        the context, whatever a mean that is guessed says."""
        return max(int(self.starts), min(self.max_num_seqs, self.rows_held(tokens_per_row)))


def fit_of(shape: ModelShape, gpu: Gpu, engine: Mapping[str, Any]) -> Fit:
    """With the options of `model.engine`. Raises ModelError for one it has no figures for."""
    tensor = int(_number(engine, "tensor_parallel_size", 1))
    stages = int(_number(engine, "pipeline_parallel_size", 1))
    world = tensor * stages
    dtype_bytes = DTYPE_BYTES.get(str(engine.get("dtype", "auto")), 2.0)
    precision = _precision(shape, engine.get("quantization"))
    weights = shape.weight_bytes(dtype_bytes, precision) / world
    free = gpu.memory * _number(engine, "gpu_memory_utilization", UTILIZATION) - OVERHEAD - weights
    kv_bytes = shape.kv_bytes_per_token(
        _kv_value_bytes(engine.get("kv_cache_dtype", "auto"), dtype_bytes)
    )
    is_fitted = engine.get("max_model_len") in ("auto", -1)
    return Fit(
        world=world,
        stages=stages,
        weights=weights,
        kv_cache=_number(engine, "kv_cache_memory_bytes", free),
        kv_bytes_per_token=kv_bytes / (stages * min(tensor, shape.kv_heads)),
        max_num_seqs=int(_number(engine, "max_num_seqs", MAX_NUM_SEQS)),
        max_model_len=0 if is_fitted else int(_number(engine, "max_model_len", shape.context)),
        computes_fp8=gpu.has_fp8 and precision is not None and precision.computes_fp8,
    )


class Work(NamedTuple):
    """Tokens of one row; means over rows. Attention grows with the square of a length, so rows of
    very unequal length cost more than their mean says."""

    prompt: float
    """With what comes from the prefix cache."""
    completion: float
    cached: float = 0.0
    """Tokens of the prompt that come from the prefix cache: no work, but read as context."""

    @property
    def tokens(self) -> float:
        return self.prompt + self.completion

    @property
    def decoded_context(self) -> float:
        """Sum over the tokens of the answer of the tokens before each."""
        return self.completion * (self.prompt + self.completion / 2)

    def flops(self, shape: ModelShape) -> float:
        """28.05e12 for A.X 3.1, 300 tokens in and 120 out."""
        context = (self.prompt**2 - self.cached**2) / 2 + self.decoded_context
        return (
            (self.tokens - self.cached) * shape.flops_per_token
            + self.completion * shape.flops_per_sampled_token
            + context * shape.attention_flops
        )


@dataclass(frozen=True)
class Floor:
    """Seconds per row on one replica with all its GPUs, in shares at the peak of each GPU."""

    compute: float
    weights: float
    """Reading the weights, once in each step of the answers; infinite where no row fits."""
    kv: float
    """Reading the KV cache for the answers."""
    rows_at_once: int

    @property
    def best(self) -> float:
        """No engine with so many rows at once is faster: compute and reading the weights overlap,
        reading the KV cache costs nothing."""
        return max(self.compute, self.weights)

    @property
    def with_kv(self) -> float:
        """As `best`, but attention reads its KV cache while nothing else runs."""
        return self.best + self.kv

    @property
    def realistic(self) -> float:
        """As `with_kv`, with the shares of the peaks that good engines reach."""
        read = REALISTIC_BANDWIDTH
        return max(self.compute / REALISTIC_MFU, self.weights / read) + self.kv / read

    @property
    def bound(self) -> Literal["compute", "weights", "does not fit"]:
        """What `realistic` waits for, KV reads apart."""
        if self.rows_at_once == 0:
            return "does not fit"
        is_compute = self.compute / REALISTIC_MFU >= self.weights / REALISTIC_BANDWIDTH
        return "compute" if is_compute else "weights"


def floor(shape: ModelShape, gpu: Gpu, engine: Mapping[str, Any], work: Work) -> Floor:
    """The physical limit for rows like `work`. Raises ModelError, as `fit_of` does."""
    fit = fit_of(shape, gpu, engine)
    rows = fit.rows_at_once(work.tokens)
    peak = gpu.flops_bf16 * (2 if fit.computes_fp8 else 1)
    # Stages work on different rows at the same time, so a step is of a stage's share of them.
    steps = work.completion / max(1.0, rows / fit.stages)
    return Floor(
        compute=work.flops(shape) / (peak * fit.world),
        weights=steps * fit.weights / gpu.bandwidth if rows else math.inf,
        kv=work.decoded_context * fit.kv_bytes_per_token / gpu.bandwidth,
        rows_at_once=rows,
    )


def smallest_tensor_parallel(
    shape: ModelShape, gpu: Gpu, engine: Mapping[str, Any], tokens_per_row: float, rows: int
) -> int | None:
    """The least power of two, up to 8, that divides the heads, with which vLLM starts and the KV
    cache holds `rows` such rows; None if there is none. Raises ModelError, as `fit_of` does."""
    for tensor in (1, 2, 4, 8):
        if shape.heads % tensor or (shape.kv_heads % tensor and tensor % shape.kv_heads):
            continue
        fit = fit_of(shape, gpu, {**engine, "tensor_parallel_size": tensor})
        if fit.starts and fit.rows_held(tokens_per_row) >= rows:
            return tensor
    return None


NOT_LLAMA = (
    "expert", "moe_", "kv_lora", "mamba", "ssm_", "linear_num", "conv_", "block_configs",
    "text_config", "vision_config", "audio_config", "is_encoder_decoder",
)  # fmt: skip
"""Of these, a key of config.json holds one where a model has experts, latent attention, layers of
other kinds, or more than text."""

SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip


def _check_shape(config: Mapping[str, Any]) -> None:
    """Raises ModelError if it isn't a dense decoder shaped as Llama: better no figure than one
    that is wrong by half."""
    foreign = [key for key, value in config.items() if value and any(n in key for n in NOT_LLAMA)]
    missing = [size for size in SIZES if not isinstance(config.get(size), int)]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if foreign:
        why = f"has `{foreign[0]}`"
    elif missing:
        why = f"has no `{missing[0]}`"
    elif set(config.get("layer_types") or ()) - {"full_attention"} or (
        window and window < config["max_position_embeddings"]
    ):
        why = "has layers that see a part of their context only"
    elif config.get("hidden_act", "silu") != "silu":
        why = f"has the activation `{config['hidden_act']}`"
    else:
        return
    raise ModelError(
        f"model.id: the plan can compute dense models shaped as Llama only; config.json {why}",
        NOT_COMPUTED,
    )


def _checkpoint_precision(quantization: Mapping[str, Any] | None) -> Precision | None:
    """Of `quantization_config` in config.json. Raises ModelError for a method without figures."""
    if not quantization:
        return None
    match quantization:
        case {"quant_method": "fp8" | "fbgemm_fp8"}:
            return FP8
        case {"quant_method": "awq" | "gptq", "bits": int(bits)}:
            return Precision(bits / 8)
        case {"quant_method": "compressed-tensors", "config_groups": {"group_0": group, **others}}:
            weights = group["weights"]
            is_fp8 = weights.get("type") == "float" and weights["num_bits"] == 8
            if not others:
                activations = group.get("input_activations")
                return Precision(weights["num_bits"] / 8, is_fp8 and activations is not None)
    raise _no_figures("quantization_config", quantization.get("quant_method"))


def _precision(shape: ModelShape, option: Any) -> Precision | None:
    """Of the layers. A quantised checkpoint decides; the option then only names the same again."""
    if shape.precision or option is None:
        return shape.precision
    if option in ONLINE_FP8:
        return FP8
    raise _no_figures("model.engine.quantization", option)


def _kv_value_bytes(option: Any, dtype_bytes: float) -> float:
    match option:
        case "auto":
            return dtype_bytes
        case "fp8" | "fp8_e4m3" | "fp8_e5m2":
            return 1.0
        case "bfloat16" | "float16":
            return 2.0
    raise _no_figures("model.engine.kv_cache_dtype", option)


def _number(engine: Mapping[str, Any], name: str, default: float) -> float:
    value = engine.get(name)
    if value is None:
        return default
    if isinstance(value, int | float):
        return value
    raise _no_figures(f"model.engine.{name}", value)  # vLLM takes `32k` for some


def _no_figures(name: str, value: Any) -> ModelError:
    return ModelError(f"{name}: the plan can't compute with `{value}`", NOT_COMPUTED)
