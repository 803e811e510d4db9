"""GGUF: what llama.cpp, the gguf package and transformers write and read is what we read and write, in every family and every type."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend

from cairn.checkpoint.foreign.gguf.families import ALIKE, FAMILIES
from cairn.checkpoint.foreign.gguf.file import GGUFFile
from cairn.checkpoint.foreign.gguf.vocabulary import RULES, files_of, metadata_of
from cairn.checkpoint.foreign.gguf.writing import TYPES, export_gguf
from cairn.checkpoint.foreign.importing import import_
from cairn.checkpoint.format import read
from cairn.errors import CairnError, InputError, MismatchError
from tests import tokenizer_kinds as kinds
from tests.models.models_drawing import DECODERS, architectures

gguf = pytest.importorskip("gguf")

SIZES = {"vocab_size": 420, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 4.0, 6.0], "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama 3": ("llama", {**GROUPED, "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": True}),
    "linear": ("llama", {**GROUPED, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": None}),
    "qwen2": ("qwen2", GROUPED),
    "yarn": ("qwen2", {**GROUPED, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 128}),
    "smollm3": ("smollm3", GROUPED),
    "granite": ("granite", {**GROUPED, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.5, "logits_scaling": 8.0}),
    "olmo2": ("olmo2", GROUPED),
    "olmo3": ("olmo3", {**GROUPED, "sliding_window": 4}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "gemma3": ("gemma3_text", {**GROUPED, "num_hidden_layers": 7, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "phi3": ("phi3", {**GROUPED, "sliding_window": None, "partial_rotary_factor": 0.5}),
    "phi3 long": ("phi3", {**GROUPED, "sliding_window": None, "rope_scaling": LONG, "original_max_position_embeddings": 16}),
    "mixtral": ("mixtral", {**GROUPED, "sliding_window": None, "num_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**GROUPED, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True, "sliding_window": None}),
    "olmoe": ("olmoe", {**SIZES, "num_experts": 4}),
    "gpt2": ("gpt2", {"vocab_size": 420, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "gpt_neox": ("gpt_neox", {**SIZES, "partial_rotary_factor": 0.5}),
}
"""Models of every family that a GGUF file can hold, some in several variants."""
THEIRS = ("llama", "qwen2", "qwen3", "gpt2")
"""Those whose GGUF files transformers reads whole: it knows neither the windows, nor the divisor of scores, nor the scaled ropes of the others.
The 1,024 positions of GPT-2 and the heads of 128 of Qwen3 it takes for granted."""
IDS = torch.tensor([[5, 9, 301, 3, 77, 400, 12, 8, 5, 33, 2]])


def saved(folder: Path, architecture: Any, kind: str | None = "byte_level", dtype: torch.dtype = torch.float32) -> Path:
    """A transformers directory of a random model whose vectors are random, too."""
    folder.mkdir(parents=True)
    model = architecture.build(seed=3, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) / 8)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**architecture.to_hf(), "dtype": name, "torch_dtype": name}))
    return kinds.write(kind, folder) if kind else folder


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids)
    return (found.logits if hasattr(found, "logits") else found).float()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A small LLaMA with a tokenizer, read only."""
    return saved(tmp_path_factory.mktemp("gguf") / "llama", DECODERS["llama"](**GROUPED, initializer_range=0.3))


@pytest.fixture(scope="module")
def written(llama) -> bytes:
    """It as the bytes of a GGUF file."""
    path = llama.parent / "written.gguf"
    export_gguf(llama, path)
    return path.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_every_family_goes_there_and_comes_back(name: str, tmp_path: Path) -> None:
    family, values = MODELS[name]
    folder = saved(tmp_path / "model", DECODERS[family](**values, initializer_range=0.2))
    export_gguf(folder, tmp_path / "model.gguf", type="F32")
    back, before = import_(tmp_path / "model.gguf", tmp_path / "back"), read.open(folder)
    assert back.config["model_type"] == ("llama" if family == "mistral" else family) and set(back.tensors) == set(before.tensors)
    added = family.startswith("gemma")  # their norms have 1 added there, in float32
    assert all(torch.allclose(t.load(), before.tensors[n].load(), rtol=0, atol=1e-6 * added) for n, t in back.tensors.items())
    assert torch.allclose(logits(back.model()), logits(before.model()), rtol=0, atol=1e-5 if added else 1e-6)
    assert back.tokenizer.encode("First 2026 stones") == before.tokenizer.encode("First 2026 stones")
    if name in THEIRS:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
        assert torch.allclose(logits(theirs), logits(back.model()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_the_gguf_package(name: str) -> None:
    """Its own table, from names here to names there."""
    model_type, values = MODELS[name]
    architecture = DECODERS[model_type](**values)
    family = next(each for each in FAMILIES if each.model_type == ALIKE.get(model_type, model_type))
    number = next(number for number, called in gguf.MODEL_ARCH_NAMES.items() if called == family.architecture)
    table = gguf.get_tensor_name_map(number, architecture.num_hidden_layers)
    for parameter, _ in architecture.meta_model().named_parameters():
        expert = family.expert_there(parameter)
        ours = family.there(parameter) if expert is None else expert[0]
        # Experts are called there as Mixtral's were in its first files, or as all of them together.
        asked = (
            parameter
            if expert is None
            else re.sub(r"(block_sparse_moe|mlp)\.experts\.\d+\.", "mlp.experts." if "mlp" in parameter else "feed_forward.experts.", parameter)
        )
        asked = asked.replace("model.layers", "layers") if "feed_forward" in asked else asked
        assert ours == table.get_name(asked, try_suffixes=(".weight", ".bias")), parameter


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_a_file_cannot_say_is_refused_and_the_rest_is_the_same_network(data: st.DataObject, tmp_path_factory) -> None:
    """Random architectures: none is written as another one."""
    architecture = data.draw(architectures())
    folder = tmp_path_factory.mktemp("drawn")
    source = saved(folder / "model", architecture, kind=None)
    try:
        export_gguf(source, folder / "model.gguf", type="F32")
    except (InputError, MismatchError):
        assume(False)
    back = import_(folder / "model.gguf", folder / "back")
    ids = torch.arange(30)[None] % architecture.vocab_size
    assert torch.allclose(logits(back.model(), ids), logits(read.open(source).model(), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_by_the_package_as_we_read_it(kind: str, llama: Path, tmp_path: Path) -> None:
    made = export_gguf(llama, tmp_path / "model.gguf", type=kind)
    back, before = import_(tmp_path / "model.gguf", tmp_path / "back"), read.open(llama).tensors
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert made["tensors"] == len(theirs) == len(before) and made["types"]["F32"] >= 9
    embedding = theirs["token_embd.weight"]
    wide = torch.from_numpy(gguf.quants.dequantize(embedding.data, embedding.tensor_type))
    assert torch.equal(wide.reshape(420, 32), back.tensors["model.embed_tokens.weight"].load().float())
    assert embedding.tensor_type.name == ("Q8_0" if kind.startswith("Q4") else kind)
    # The largest error of a block: half a step, of which there are as many as the type has.
    steps = {"F32": 1e9, "F16": 2**10, "BF16": 2**7, "Q8_0": 127, "Q4_0": 7, "Q4_1": 7.5}[kind]
    for name, tensor in back.tensors.items():
        exact = before[name].load()
        spans = exact.abs().reshape(-1, 32).amax(1, keepdim=True)
        assert bool(((tensor.load().float() - exact).abs().reshape(-1, 32) <= spans * 1.1 / steps + 1e-9).all()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays_where_nothing_is_lost(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", DECODERS["llama"](**GROUPED), dtype=dtype)
    made = export_gguf(folder, tmp_path / "model.gguf")
    back, before = import_(tmp_path / "model.gguf", tmp_path / "back"), read.open(folder).tensors
    assert made["type"] == ("BF16" if dtype == torch.bfloat16 else "F16") and back.config["dtype"] == str(dtype).removeprefix("torch.")
    assert all(torch.equal(tensor.load(), before[name].load()) for name, tensor in back.tensors.items())
    save_file({n: t.load().float() + (1e-4 if t.load().ndim == 1 else 0) for n, t in before.items()}, folder / "model.safetensors")
    export_gguf(folder, tmp_path / "finer.gguf", type=made["type"])
    assert import_(tmp_path / "finer.gguf", tmp_path / "finer").config["dtype"] == "float32"  # vectors that the dtype of the matrices would round


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_other_quantizations_are_read_by_the_packages_own_rules(kind: str, tmp_path: Path) -> None:
    number, draw = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    shape = gguf.quant_shape_to_byte_shape((6, 512), number)
    codes = draw.integers(0, 60, shape).astype(np.uint8)  # small bytes are finite scales
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("token_embd.weight", codes, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile.open(tmp_path / "one.gguf").tensors["token_embd.weight"].read()
    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(codes, number)))


# -- tokenizers --------------------------------------------------------------------------------------------------------

TEXTS = ["First Citizen, 2026 stones!", "  two  spaces\n\n\tand 3.14159 or 100000", "naïve café 日本語 ½ ①", "it's WE'LL don't <|end|> x", ""]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_tokenizers_come_back(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", DECODERS["llama"](**GROUPED), kind)
    export_gguf(folder, tmp_path / "model.gguf")
    back, before = import_(tmp_path / "model.gguf", tmp_path / "back").tokenizer, read.open(folder).tokenizer
    for text in TEXTS:
        assert back.encode(text) == before.encode(text) and back.encode_whole(text) == before.encode_whole(text)
        assert back.decode(back.encode(text)) == before.decode(before.encode(text))
    assert back.special_tokens.keys() >= before.special_tokens.keys() and before.end_ids <= back.end_ids and back.front == before.front


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_one_of_the_library_and_keeps_its_meaning(name: str) -> None:
    """Text is parted into words without loss, and an export finds a name of the same rule."""
    document = json.loads(kinds.byte_level())
    document |= {"pre_tokenizer": RULES[name].splits, "normalizer": None}
    document["model"]["ignore_merges"] = RULES[name].whole_words
    words = [word for word, _ in Backend.from_str(json.dumps(document)).pre_tokenizer.pre_tokenize_str("In 12345 days, it'll be café.")]
    longest = max(len(word.lstrip("Ġ")) for word in words if word.lstrip("Ġ").isdigit())
    assert longest == {"smollm": 1, "qwen2": 1, "tekken": 1, "llama-bpe": 3, "gpt-2": 5, "default": 3}.get(name, longest)
    assert "".join(words) == "InĠ12345Ġdays,Ġit'llĠbeĠcafÃ©."
    found = metadata_of(json.dumps(document).encode(), {}, [], None, 500, "here")["tokenizer.ggml.pre"]
    assert (RULES[found].splits, RULES[found].whole_words) == (RULES[name].splits, RULES[name].whole_words)


def test_ends_templates_and_special_tokens_travel(llama: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", DECODERS["llama"](**GROUPED))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    export_gguf(folder, tmp_path / "model.gguf")
    back = import_(tmp_path / "model.gguf", tmp_path / "back")
    assert back.read_file("chat_template.jinja") == b"{{ messages[0]['content'] }}" and {3, 7} <= back.tokenizer.end_ids
    facts = back.lineage.options["facts"]
    from blake3 import blake3

    assert facts["digest"] == blake3((tmp_path / "model.gguf").read_bytes()).hexdigest() and back.lineage.kind == "import"
    folder_of_one = import_(tmp_path, tmp_path.parent / f"{tmp_path.name}-again", layout="gguf")  # a folder that holds the file
    assert folder_of_one.model_digest == back.model_digest


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(data: bytes, folder: Path, **options: Any) -> str:
    """The one sentence with which a file is refused; nothing is written."""
    folder.mkdir(exist_ok=True)
    path = folder / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CairnError) as error:
        import_(path, folder / "out", **options)
    assert sorted(item.name for item in folder.iterdir()) == ["bad.gguf"] and "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_cut_short_are_refused_wherever_they_end(written: bytes, tmp_path: Path) -> None:
    for end in (0, 3, 9, 23, 40, 200, 2000, len(written) // 2, len(written) - 1):
        assert "cut short" in refused(written[:end], tmp_path / str(end)), end
    assert "no GGUF" in refused(b"PK\3\4" + written[4:], tmp_path / "zip")


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(place=st.integers(4, 12000), value=st.integers(0, 255))
def test_whatever_byte_of_a_header_is_wrong_nobody_sees_a_traceback(place: int, value: int, written: bytes, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "bad.gguf").write_bytes(written[:place] + bytes([value]) + written[place + 1 :])
    try:
        file = GGUFFile.open(folder / "bad.gguf")
        files_of(file)
        from cairn.checkpoint.foreign.import_plan import plan

        plan(folder / "bad.gguf")
    except CairnError as error:
        assert "\n" not in str(error)


def with_metadata(data: bytes, folder: Path, changes: dict[str, Any], lost: tuple[str, ...] = ()) -> bytes:
    """The same model with other metadata, written by the gguf package."""
    (folder / "from.gguf").write_bytes(data)
    file = GGUFFile.open(folder / "from.gguf")
    writer = gguf.GGUFWriter(folder / "to.gguf", changes.pop("general.architecture", "llama"))
    for key, value in {**file.metadata, **changes}.items():
        if key not in ("general.architecture", *lost):
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value) if not isinstance(value, list) else gguf.GGUFValueType.ARRAY)
    for tensor in file.tensors.values():
        writer.add_tensor(tensor.name, tensor.read().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "from.gguf").unlink()
    made = (folder / "to.gguf").read_bytes()
    (folder / "to.gguf").unlink()
    return made


@pytest.mark.parametrize(
    ("changes", "lost", "said"),
    [
        ({"general.architecture": "mamba"}, (), "architecture 'mamba'"),
        ({"llama.embedding_length": 48}, (), "config.json asks for"),
        ({"llama.block_count": 5}, (), "there is no"),
        ({"llama.block_count": 3}, (), "an unknown"),
        ({"llama.attention.head_count": [4, 4, 4, 4]}, (), "one number was expected"),
        ({"llama.attention.head_count": 0}, (), "0 heads"),
        ({"llama.expert_count": 8}, (), "metadata 'llama.expert_used_count' are missing"),
        ({"split.count": 3}, (), "join them first"),
        ({}, ("llama.block_count",), "'llama.block_count' are missing"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, (), "rule 'longrope'"),
        ({"tokenizer.ggml.pre": "smollm2"}, (), "rule 'smollm2', which is not known here; give the model's own files with --tokenizer. Did you mean 'smollm'"),
        ({"tokenizer.ggml.model": "bert"}, (), "kind 'bert'"),
        ({"tokenizer.ggml.merges": ["Q Z"]}, (), "merge 'Q Z'"),
        ({"tokenizer.ggml.eos_token_id": 9999}, (), "the eos token is 9999"),
        ({"tokenizer.ggml.token_type": [1, 1]}, (), "the kinds of 2"),
    ],
)
def test_what_is_not_known_is_refused_in_one_sentence(changes: dict[str, Any], lost: tuple[str, ...], said: str, written: bytes, tmp_path: Path) -> None:
    assert said in refused(with_metadata(written, tmp_path, dict(changes), lost), tmp_path / "refused")


def test_quantizations_that_are_not_known_are_named(written: bytes, tmp_path: Path) -> None:
    at = written.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    assert "number 99" in refused(written[:at] + struct.pack("<I", 99) + written[at + 4 :], tmp_path / "number")
    assert "stored as I32" in refused(written[:at] + struct.pack("<I", 26) + written[at + 4 :], tmp_path / "integers")


def test_exports_that_would_be_another_model_are_refused(tmp_path: Path) -> None:
    cases = {
        "look back": DECODERS["mistral"](**GROUPED, sliding_window=8),
        "no_rope_layer_interval=3": DECODERS["smollm3"](**GROUPED, no_rope_layer_interval=3),
        "in another order": DECODERS["smollm3"](**GROUPED, no_rope_layers=[1, 0, 1, 1]),
        "rotations in another order": DECODERS["olmo3"](**GROUPED, sliding_window=4, layer_types=["full_attention"] * 4),
        "divided": DECODERS["gemma2"](**GROUPED, head_dim=8, query_pre_attn_scalar=9),
        "sliding": DECODERS["qwen2"](**GROUPED, sliding_window=8),
        "rule 'dynamic'": DECODERS["llama"](**GROUPED, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "rope_local": DECODERS["gemma3_text"](**GROUPED, head_dim=8, query_pre_attn_scalar=8, rope_local_base_freq=50.0),
    }
    for number, (said, architecture) in enumerate(cases.items()):
        folder = saved(tmp_path / str(number), architecture)
        with pytest.raises(CairnError, match=said):
            export_gguf(folder, tmp_path / "none.gguf")
    assert not [path for path in tmp_path.iterdir() if not path.name.isdigit()]


def test_refusals_of_an_export(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "taken.gguf").write_text("taken")
    with pytest.raises(InputError, match="exists"):
        export_gguf(llama, tmp_path / "taken.gguf")
    with pytest.raises(InputError, match="type is one of"):
        export_gguf(llama, tmp_path / "new.gguf", type="Q4_K")
    folder = saved(tmp_path / "large", DECODERS["llama"](**GROUPED))
    tensors = {name: tensor.load() for name, tensor in read.open(folder).tensors.items()}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="1e\\+06, which F16 cannot say"):
        export_gguf(folder, tmp_path / "new.gguf", type="F16")
    wordpiece = saved(tmp_path / "words", DECODERS["llama"](**GROUPED), "wordpiece")
    with pytest.raises(InputError, match="WordPiece"):
        export_gguf(wordpiece, tmp_path / "new.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "taken.gguf", "words"]


# -- the real file -----------------------------------------------------------------------------------------------------


def test_the_real_model_knows_the_capital_of_france(smollm: Path) -> None:
    from cairn.generation.sample import generate_texts

    opened = read.open(smollm)
    tokenizer = opened.tokenizer
    assert [tokenizer.decode([number]) for number in tokenizer.encode("In 2024, 123 stones")] == [
        "In",
        " ",
        "2",
        "0",
        "2",
        "4",
        ",",
        " ",
        "1",
        "2",
        "3",
        " stones",
    ]
    assert tokenizer.end_ids == {0, 2} and tokenizer.front == [] and opened.config["dtype"] == "float32"
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    (text,) = generate_texts(opened.model(), tokenizer, [tokenizer.encode(prompt)], max_new_tokens=12, temperature=0)
    assert text == "The capital of France is Paris."
    assert sum(tensor.load().numel() for tensor in opened.tensors.values()) == 134_515_008
    assert opened.lineage.options["facts"]["digest"] == "5f4fa13bfc6dd4a91fd00e22974a9c4e9ed628fd7d7f307398ddf30260d6b2c3"
