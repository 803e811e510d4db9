"""Where the parts of a causal language model lie: blocks, projections, norms, embedding, head; by state-dict name.

Works on our models and on those of `transformers`; an encoder-decoder has two stacks of blocks, the encoder's first. The parts are
found by structure: the blocks are the list of modules that holds most matrices, the head is the matrix as tall as the vocabulary, the
way down is the matrix that ends at the model's width. Names decide only what shapes cannot tell apart (query from key, gate from up).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cairn.checkpoint.format.building import without_code
from cairn.errors import InputError, MismatchError

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"encdec|enc_dec|encoder|cross", re.IGNORECASE)
_NORM = re.compile(r"norm", re.IGNORECASE)
_LETTER = {
    "q": re.compile(r"^(w?q|query)(_|$)|_q$"),
    "k": re.compile(r"^(w?k|key)(_|$)|_k$"),
    "v": re.compile(r"^(w?v|value)(_|$)|_v$"),
}
_GATE = re.compile(r"gate|^w1$|^wi_0$")


@dataclass(frozen=True)
class Matrix:
    """A linear map from `inputs` to `outputs`. `weight` and `bias` are state-dict names; the stored weight is
    (outputs, inputs), or (inputs, outputs) where `transposed`."""

    weight: str
    outputs: int
    inputs: int
    bias: str | None = None
    transposed: bool = False


@dataclass(frozen=True)
class BlockParts:
    """The parts of one block. Fused projections stand in `qkv` and `gate_up`, the separate ones are None then; a mixture of
    experts has no single gate, up and down. `norms` are module names in order; `inner_norms` lie inside attention. A decoder that looks at
    an encoder has a second attention, `cross`, with projections of its own."""

    name: str
    attention: str
    mlp: str
    q: Matrix | None = None
    k: Matrix | None = None
    v: Matrix | None = None
    qkv: Matrix | None = None
    o: Matrix | None = None
    gate: Matrix | None = None
    up: Matrix | None = None
    gate_up: Matrix | None = None
    down: Matrix | None = None
    norms: list[str] = field(default_factory=list)
    inner_norms: list[str] = field(default_factory=list)
    cross: str | None = None
    cross_q: Matrix | None = None
    cross_k: Matrix | None = None
    cross_v: Matrix | None = None
    cross_o: Matrix | None = None

    def matrices(self) -> dict[str, Matrix]:
        """The matrices that there are, by their part: `{'q': ..., 'down': ...}`."""
        parts = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "cross_q", "cross_k", "cross_v", "cross_o")
        return {part: getattr(self, part) for part in parts if getattr(self, part) is not None}


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model. `embedding`, `head` and `positions` are names of weights; a tied head bears the embedding's."""

    blocks: list[BlockParts]
    embedding: str
    head: str
    tied: bool
    final_norm: str | None
    positions: str | None
    width: int
    vocabulary: int

    def block_of(self, tensor: str) -> int | None:
        """Index of the block that the tensor of this name belongs to; None for embedding, head and final norm."""
        return next((i for i, block in enumerate(self.blocks) if tensor.startswith(f"{block.name}.")), None)


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a language model. Raises `MismatchError` where it has no such structure."""
    stacks = _stacks(model)
    outside = [(name, module) for name, module in model.named_modules() if not name.startswith(tuple(f"{stack}." for stack, _ in stacks))]
    matrices = [(name, m) for name, m in outside if _is_matrix(m) and not isinstance(m, nn.Embedding)]
    embeddings = [(name, module) for name, module in outside if isinstance(module, nn.Embedding)]
    if not embeddings:
        raise MismatchError(f"{type(model).__name__} has no embedding, so it is not a language model of a known structure.")
    embedding_name, embedding = _token_embedding(embeddings, matrices)
    vocabulary, width = embedding.weight.shape
    heads = [(name, m) for name, m in matrices if _shape(m)[0] == vocabulary]
    tied = not heads or heads[-1][1].weight is embedding.weight
    embedding_weight = f"{embedding_name}.weight"
    positions = [name for name, m in embeddings if name != embedding_name and m.weight.shape[1] == width]
    norms = [name for name, module in outside if _is_norm(module)]
    return Anatomy(
        blocks=[_block(f"{stack}.{i}", block) for stack, blocks in stacks for i, block in enumerate(blocks)],
        embedding=embedding_weight,
        head=embedding_weight if tied else f"{heads[-1][0]}.weight",
        tied=tied,
        final_norm=norms[-1] if norms else None,
        positions=f"{positions[0]}.weight" if positions else None,
        width=width,
        vocabulary=vocabulary,
    )


def anatomy_of_config(config: Mapping[str, Any]) -> Anatomy:
    """The anatomy of the model that a config.json describes, without memory for its weights: ours, else transformers'."""
    from cairn import catalog
    from cairn.models.config import architecture

    if catalog.has("architecture", str(config.get("model_type"))):
        return anatomy(architecture(config).meta_model())
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    except ImportError:
        raise InputError(f"A model of type '{config.get('model_type')}' needs transformers: pip install 'cairn-lm[hf]'.") from None
    values = dict(config)
    family = values.pop("model_type", None)
    if not isinstance(family, str):
        raise InputError("config.json has no 'model_type', so its family is not known.")
    try:
        described = AutoConfig.for_model(family, **without_code(values))
        with torch.device("meta"):
            made_by = AutoModelForSeq2SeqLM if described.is_encoder_decoder else AutoModelForCausalLM
            model = made_by.from_config(described, trust_remote_code=False)
    except Exception as error:  # whatever the library makes of a config.json that it does not understand
        raise InputError(f"transformers cannot build the '{family[:40]}' model of config.json: {' '.join(str(error).split())[:200]}") from error
    return anatomy(model)


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2


def _is_norm(module: nn.Module) -> bool:
    return bool(_NORM.search(type(module).__name__)) and not any(True for _ in module.children())


def _shape(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a matrix; transformers' Conv1D stores the transpose and names its outputs `nf`."""
    rows, columns = module.weight.shape
    return (columns, rows) if _transposed(module) else (rows, columns)


def _transposed(module: Any) -> bool:
    return not isinstance(module, nn.Linear) and getattr(module, "nf", None) == module.weight.shape[1]


def _matrix(name: str, module: nn.Module) -> Matrix:
    outputs, inputs = _shape(module)
    bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
    return Matrix(f"{name}.weight", outputs, inputs, bias, _transposed(module))


def _stacks(model: Any) -> list[tuple[str, nn.ModuleList]]:
    """The list of blocks, or that of the encoder and that of the decoder."""
    ours, theirs = getattr(model, "architecture", None), getattr(model, "config", None)
    if not (getattr(ours, "encoder_decoder", False) or getattr(theirs, "is_encoder_decoder", False)):
        return [_blocks(model)]
    parts = {name: next((n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] == name), None) for name in ("encoder", "decoder")}
    if None in parts.values():
        raise MismatchError(f"{type(model).__name__} has no part called encoder and none called decoder.")
    found = [(str(part), *_blocks(model.get_submodule(part))) for part in parts.values()]
    return [(f"{part}.{name}", blocks) for part, name, blocks in found]


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    sized = [(sum(p.numel() for p in m.parameters()), name, m) for name, m in lists if all(any(_is_matrix(x) for x in b.modules()) for b in m)]
    if not sized:
        raise MismatchError(f"{type(model).__name__} has no list of blocks with matrices in them.")
    _, name, blocks = max(sized, key=lambda item: item[0])  # of nested lists, the outermost has most parameters and comes first
    return name, blocks


def _token_embedding(embeddings: list[tuple[str, nn.Embedding]], matrices: list[tuple[str, nn.Module]]) -> tuple[str, nn.Embedding]:
    """The embedding that the head shares or is as tall as, where there are several; the largest where no head tells."""
    for name, embedding in embeddings:
        if any(module.weight is embedding.weight for _, module in matrices):
            return name, embedding
    heights = {_shape(module)[0] for _, module in matrices}
    return max(embeddings, key=lambda item: (item[1].num_embeddings in heights, item[1].num_embeddings))


def _block(name: str, block: nn.Module) -> BlockParts:
    inside = [(f"{name}.{child}", module) for child, module in block.named_modules() if child]
    attention, cross = _attentions(inside)
    if attention is None:
        raise MismatchError(f"Block '{name}' ({type(block).__name__}) has no attention; models without it have no such anatomy.")
    linear = [(n, _matrix(n, m)) for n, m in inside if _is_matrix(m) and not isinstance(m, nn.Embedding)]  # biases by distance are an embedding
    within = [(n, matrix) for n, matrix in linear if n.startswith(f"{attention}.")]
    across = [(n, matrix) for n, matrix in linear if cross is not None and n.startswith(f"{cross}.")]
    others = [(n, matrix) for n, matrix in linear if (n, matrix) not in within and (n, matrix) not in across]
    mlp = _mlp_name(name, attention, inside, [n for n, _ in others], cross)
    norms = [n for n, m in inside if _is_norm(m)]
    return BlockParts(
        name=name,
        attention=attention,
        mlp=mlp,
        **_attention_parts(attention, within),
        **_mlp_parts(others, width=_width(within)),
        norms=[n for n in norms if not n.startswith(f"{attention}.")],
        inner_norms=[n for n in norms if n.startswith(f"{attention}.")],
        cross=cross,
        **({f"cross_{part}": matrix for part, matrix in _attention_parts(cross, across).items()} if cross is not None else {}),
    )


def _attentions(inside: list[tuple[str, nn.Module]]) -> tuple[str | None, str | None]:
    """The attention of a block over itself, and the one over what an encoder read, which comes second and says so."""
    found = [n for n, m in inside if _ATTENTION.search(n.rsplit(".", 1)[-1]) and any(_is_matrix(x) for x in m.modules())]
    first = found[0] if found else None
    return first, next((n for n in found if _CROSS.search(n.rsplit(".", 1)[-1]) and n != first), None)


def _mlp_name(block: str, attention: str, inside: list[tuple[str, nn.Module]], matrices: list[str], cross: str | None) -> str:
    """The module that holds the MLP: a child with weights of two or more dimensions, or the innermost one around all of its matrices."""
    for name, module in inside:
        child = name.count(".") == block.count(".") + 1
        taken = attention.startswith(name) or (cross is not None and cross.startswith(name))
        if child and not taken and name not in matrices and any(p.ndim > 1 for p in module.parameters()):
            return name
    holders = [name.split(".")[:-1] for name in matrices]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*holders, strict=False))]
    return ".".join(shared) if shared else block


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _width(attention: list[tuple[str, Matrix]]) -> int:
    """The model's width: what every matrix into attention reads (the most frequent input size)."""
    sizes = [matrix.inputs for _, matrix in attention]
    return max(sizes, key=sizes.count)


def _attention_parts(attention: str, matrices: list[tuple[str, Matrix]]) -> dict[str, Matrix | None]:
    found: dict[str, Matrix | None] = {letter: next((m for n, m in matrices if pattern.search(_last(n))), None) for letter, pattern in _LETTER.items()}
    rest = [m for _, m in matrices if m not in found.values()]
    if all(found.values()) and len(rest) == 1:
        return {**found, "o": rest[0]}
    if len(matrices) == 2:  # one of them makes queries, keys and values at once, so it has the more outputs for its inputs
        fused, out = sorted((m for _, m in matrices), key=lambda m: m.inputs / m.outputs)
        return {"qkv": fused, "o": out}
    raise MismatchError(f"The projections of '{attention}' are not understood: {', '.join(_last(n) for n, _ in matrices)}.")


def _mlp_parts(matrices: list[tuple[str, Matrix]], width: int) -> dict[str, Matrix | None]:
    gates = [(n, m) for n, m in matrices if _GATE.search(_last(n))]
    if len(matrices) == 3 and len(gates) == 1:
        gate = gates[0][1]
        up, down = _up_and_down([m for _, m in matrices if m is not gate], width)
        return {"gate": gate, "up": up, "down": down}
    if len(matrices) == 2:
        up, down = _up_and_down([m for _, m in matrices], width)
        return {"gate_up" if up.outputs == 2 * down.inputs else "up": up, "down": down}
    return {}


def _up_and_down(pair: list[Matrix], width: int) -> tuple[Matrix, Matrix]:
    """Down ends at the model's width; where an MLP is no wider than the model, the first matrix is taken for up."""
    first, second = pair
    return (second, first) if first.inputs != width and second.inputs == width else (first, second)
