"""Capacity: the figures of A.X 3.1 that were worked out by hand come out, and laws hold."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.forecast.capacity import (
    Fit,
    Floor,
    ModelShape,
    Work,
    fit_of,
    floor,
    smallest_tensor_parallel,
)
from pipeline.forecast.gpus import GPUS
from pipeline.model import DEMO_MODEL

AX31 = Path(__file__).parents[2] / "shared" / "data" / "ax31"

LARGE: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 48,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 21824,
    "vocab_size": 102400,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LIGHT = LARGE | {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 10880,
}

H100 = GPUS["H100"]
AX = ModelShape.from_config(LARGE)
MANY = {"max_num_seqs": 1024}
TRANSLATION = Work(prompt=300, completion=120)
CACHED = Work(prompt=300, completion=120, cached=200)
DOCUMENT = Work(prompt=20_000, completion=800)


def near(figure: float) -> Any:
    return pytest.approx(figure, rel=0.03)


def fit(tensor: int = 1, **engine: Any) -> Fit:
    return fit_of(AX, H100, {**MANY, "tensor_parallel_size": tensor, **engine})


def floor_of(work: Work, tensor: int = 2, **engine: Any) -> Floor:
    return floor(AX, H100, {**MANY, "tensor_parallel_size": tensor, **engine}, work)


@pytest.mark.parametrize(("name", "config"), [("A.X-3.1", LARGE), ("A.X-3.1-Light", LIGHT)])
def test_the_configs_here_are_those_of_the_models(name: str, config: dict[str, Any]) -> None:
    path = AX31 / name / "config.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    published = ModelShape.from_config(json.loads(path.read_text(encoding="utf-8")))
    assert published == ModelShape.from_config(config)


def test_sizes_of_ax31() -> None:
    assert AX.block_weights == near(32.99e9)
    assert AX.parameters == near(34.67e9)
    assert AX.flops_per_token == near(66.0e9)
    assert AX.flops_per_sampled_token == near(1.68e9)
    assert AX.attention_flops == near(1.573e6)
    assert AX.kv_bytes_per_token() == 196_608
    assert ModelShape.from_config(LIGHT).kv_bytes_per_token() == 524_288


@pytest.mark.parametrize(
    ("engine", "tokens"),
    [
        ({}, 25e3),
        ({"quantization": "fp8"}, 192e3),
        ({"tensor_parallel_size": 2}, 402e3),
        ({"tensor_parallel_size": 4}, 1.16e6),
    ],
    ids=["TP1", "TP1 fp8", "TP2", "TP4"],
)
def test_kv_tokens_of_ax31_on_h100(engine: dict[str, Any], tokens: float) -> None:
    assert fit_of(AX, H100, engine).kv_tokens == near(tokens)


def test_rows_at_once_of_ax31_on_two_h100() -> None:
    assert fit(2).rows_at_once(420) == near(957)
    assert fit(2).rows_at_once(20_800) == 19
    assert fit(2, max_num_seqs=512).rows_at_once(420) == 512
    assert fit(2, max_num_seqs=512).rows_held(420) == near(957)


def test_vllm_does_not_start_where_one_row_of_full_length_has_no_room() -> None:
    assert fit(1).fits
    assert not fit(1).starts
    assert fit(1, max_model_len=8192).starts
    assert fit(1, max_model_len="auto").starts
    assert fit(2).starts


@pytest.mark.parametrize(
    ("work", "teraflop", "best", "realistic"),
    [(TRANSLATION, 28.05, 70.5, 33), (CACHED, 14.83, 133, 60), (DOCUMENT, 1714, 1.15, 0.43)],
    ids=["translation", "cached", "document"],
)
def test_rows_per_second_of_ax31_on_two_h100(
    work: Work, teraflop: float, best: float, realistic: float
) -> None:
    assert work.flops(AX) / 1e12 == near(teraflop)
    assert 1 / floor_of(work).best == near(best)
    assert 1 / floor_of(work).realistic == near(realistic)
    assert floor_of(work).bound == "compute"


def test_reading_the_kv_cache_counts_for_documents() -> None:
    bf16, fp8 = floor_of(DOCUMENT), floor_of(DOCUMENT, kv_cache_dtype="fp8")
    assert 1 / bf16.with_kv == near(0.74)
    assert bf16.with_kv / fp8.with_kv == near(1.22)


def test_one_gpu_with_fp8_computes_as_two_with_bf16() -> None:
    for work in (TRANSLATION, CACHED, DOCUMENT):
        one, two = floor_of(work, 1, quantization="fp8"), floor_of(work, 2)
        assert one.compute == pytest.approx(two.compute)


def test_few_rows_at_once_wait_for_the_weights() -> None:
    assert floor_of(TRANSLATION, max_num_seqs=8).bound == "weights"
    below, above = floor_of(TRANSLATION, max_num_seqs=8), floor_of(TRANSLATION, max_num_seqs=16)
    assert below.best == pytest.approx(2 * above.best)


def test_fp8_is_half_the_memory_on_any_gpu_and_twice_the_speed_on_some() -> None:
    for name, speedup in [("H100", 2), ("L40S", 2), ("A100", 1)]:
        bf16, fp8 = [
            floor(AX, GPUS[name], {"tensor_parallel_size": 4, "quantization": option}, CACHED)
            for option in (None, "fp8")
        ]
        assert bf16.compute == pytest.approx(speedup * fp8.compute)
        assert fp8.weights < bf16.weights


def test_a_model_that_does_not_fit_has_no_floor() -> None:
    l40s = GPUS["L40S"]
    assert not fit_of(AX, l40s, {}).fits
    assert fit_of(AX, l40s, {}).kv_tokens == 0
    assert not fit_of(AX, l40s, {"max_model_len": "auto"}).starts
    nothing = floor(AX, l40s, {}, TRANSLATION)
    assert (nothing.bound, nothing.best, nothing.realistic) == ("does not fit", math.inf, math.inf)
    too_long = floor(AX, H100, {}, Work(prompt=30_000, completion=100))
    assert too_long.bound == "does not fit"


def test_kv_cache_size_may_be_given() -> None:
    assert fit(2, kv_cache_memory_bytes=196_608 * 500).kv_tokens == 1000


def test_more_ranks_than_kv_heads_hold_the_cache_twice() -> None:
    two_heads = ModelShape.from_config(LARGE | {"num_key_value_heads": 2})
    at_two, at_four = [
        fit_of(two_heads, H100, {"tensor_parallel_size": tensor}) for tensor in (2, 4)
    ]
    assert at_two.kv_bytes_per_token == at_four.kv_bytes_per_token


def test_pipeline_parallel_splits_memory_and_reads_weights_more_often() -> None:
    tensor, stages = fit(2), fit(1, pipeline_parallel_size=2)
    assert (tensor.world, tensor.kv_tokens) == (stages.world, stages.kv_tokens)
    by_tensor, by_stage = floor_of(CACHED, 2), floor_of(CACHED, 1, pipeline_parallel_size=2)
    assert by_stage.compute == by_tensor.compute
    assert by_stage.weights == pytest.approx(2 * by_tensor.weights)


def test_smallest_tensor_parallel() -> None:
    def smallest(tokens: float, rows: int, **engine: Any) -> int | None:
        return smallest_tensor_parallel(AX, H100, engine, tokens, rows)

    assert smallest(420, 512) == 2
    assert smallest(420, 1024) == 4
    assert smallest(420, 256, quantization="fp8") == 1
    assert smallest(420, 10) == 2  # one GPU would hold them, but vLLM would not start
    assert smallest(420, 10, max_model_len=4096) == 1
    assert smallest(420, 10, max_model_len=4096, tensor_parallel_size=8) == 1
    assert smallest(420, 1_000_000) is None


@pytest.mark.parametrize(("heads", "smallest"), [(6, None), (8, 4)])
def test_tensor_parallel_divides_the_heads(heads: int, smallest: int | None) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads}
    shape = ModelShape.from_config(LARGE | sizes)
    assert smallest_tensor_parallel(shape, H100, {}, 420, 2000) == smallest


engines = st.fixed_dictionaries(
    {
        "tensor_parallel_size": st.sampled_from([1, 2, 4]),
        "max_num_seqs": st.integers(1, 2048),
    },
    optional={
        "pipeline_parallel_size": st.sampled_from([1, 2]),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8", "bfloat16"]),
        "gpu_memory_utilization": st.floats(0.3, 0.95),
    },
)
gpus = st.sampled_from(sorted(GPUS.values(), key=lambda gpu: gpu.name))
shapes = st.sampled_from([AX, ModelShape.from_config(LIGHT)])
works = st.builds(
    lambda prompt, completion, share: Work(prompt, completion, share * prompt),
    st.floats(1, 30_000),
    st.floats(1, 4_000),
    st.floats(0, 1),
)


@given(shapes, gpus, engines)
def test_more_gpus_never_hold_fewer_tokens(shape: ModelShape, gpu: Any, engine: Any) -> None:
    for option in ("tensor_parallel_size", "pipeline_parallel_size"):
        doubled = {**engine, option: 2 * engine.get(option, 1)}
        assert fit_of(shape, gpu, doubled).kv_tokens >= fit_of(shape, gpu, engine).kv_tokens


@given(shapes, gpus, engines, works, st.floats(0, 5_000), st.floats(0, 5_000))
def test_longer_rows_never_take_less(
    shape: ModelShape, gpu: Any, engine: Any, work: Work, prompt: float, completion: float
) -> None:
    shorter = floor(shape, gpu, engine, work)
    longer = floor(
        shape, gpu, engine, Work(work.prompt + prompt, work.completion + completion, work.cached)
    )
    assert longer.best >= shorter.best
    assert longer.realistic >= shorter.realistic


@given(shapes, gpus, engines, works)
def test_fp8_is_never_slower(shape: ModelShape, gpu: Any, engine: Any, work: Work) -> None:
    plain = floor(shape, gpu, engine, work)
    for smaller in ({"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}):
        other = floor(shape, gpu, {**engine, **smaller}, work)
        assert other.best <= plain.best
        assert other.realistic <= plain.realistic


@given(shapes, gpus, engines, works)
def test_nothing_is_faster_than_the_floor(
    shape: ModelShape, gpu: Any, engine: Any, work: Work
) -> None:
    seconds = floor(shape, gpu, engine, work)
    assert 0 < seconds.best <= seconds.with_kv <= seconds.realistic


def test_head_dim_follows_from_the_hidden_size() -> None:
    without = {key: value for key, value in LARGE.items() if key != "head_dim"}
    assert ModelShape.from_config(without) == AX
    assert ModelShape.from_config(without | {"head_dim": None}) == AX
    assert ModelShape.from_config(without | {"head_dim": 64}).kv_bytes_per_token() == 98_304


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 32_768),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 131_072),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 32_768),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 32_768),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, 4096),
    ],
)
def test_context_is_what_vllm_makes_of_the_rope(changes: dict[str, Any], context: int) -> None:
    assert ModelShape.from_config(LARGE | changes).context == context


def test_tied_embeddings_count_once() -> None:
    tied = ModelShape.from_config(LARGE | {"tie_word_embeddings": True})
    assert AX.parameters - tied.parameters == 102_400 * 8192


def test_the_embedded_model_has_a_shape() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    assert ModelShape.from_config(config).parameters < 20e6


def fp8_group(activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"weights": {"type": "float", "num_bits": 8}, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("quantization", "block_bytes", "computes_fp8"),
    [
        ({"quant_method": "fp8"}, 1, True),
        ({"quant_method": "awq", "bits": 4}, 0.5, False),
        ({"quant_method": "gptq", "bits": 8}, 1, False),
        (fp8_group({"num_bits": 8}), 1, True),
        (fp8_group(None), 1, False),
    ],
    ids=["fp8", "awq", "gptq", "compressed fp8", "compressed fp8 weights only"],
)
def test_quantised_checkpoints(
    quantization: dict[str, Any], block_bytes: float, computes_fp8: bool
) -> None:
    shape = ModelShape.from_config(LARGE | {"quantization_config": quantization})
    for engine in ({}, {"quantization": quantization["quant_method"]}):
        found = fit_of(shape, H100, engine)
        assert found.weights == shape.block_weights * block_bytes + 2 * shape.embedding_weights
        assert found.computes_fp8 == computes_fp8


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_local_experts": 8}, "has `num_local_experts`"),
        ({"n_routed_experts": 64}, "has `n_routed_experts`"),
        ({"kv_lora_rank": 512}, "has `kv_lora_rank`"),
        ({"vision_config": {"depth": 32}}, "has `vision_config`"),
        ({"intermediate_size": None}, "has no `intermediate_size`"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "a part of their context"),
        ({"sliding_window": 4096}, "a part of their context"),
        ({"hidden_act": "gelu_new"}, "has the activation `gelu_new`"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "can't compute with `mxfp4`"),
    ],
)
def test_other_shapes_are_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        ModelShape.from_config(LARGE | change)


def test_harmless_keys_are_no_other_shape() -> None:
    qwen = {"sliding_window": 131_072, "use_sliding_window": False, "num_experts": 0}
    assert ModelShape.from_config(LARGE | qwen | {"layer_types": ["full_attention"] * 48}) == AX


@pytest.mark.parametrize(
    "option",
    [
        {"quantization": "bitsandbytes"},
        {"kv_cache_dtype": "turboquant_4bit_nc"},
        {"max_model_len": "32k"},
    ],
)
def test_options_without_figures_are_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ModelError, match=rf"model\.engine\.{name}: "):
        fit_of(AX, H100, option)
