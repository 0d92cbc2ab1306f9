"""A GGUF file of a Llama as a folder of Hugging Face, which `jaxpattern.lm.load` reads.

Blocks of F32, F16, BF16, Q4_0, Q4_1 and Q8_0 are dequantized to float32, and the rows of queries
and keys, which llama.cpp interleaves, go back to where Hugging Face has them. The byte-level BPE
inside becomes a `tokenizer.json`.

    python examples/gguf_file.py MODEL.gguf FOLDER
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
# Number of the type → numbers in a block, and what a block holds.
BLOCKS = {
    0: (1, [("x", "<f4")]),
    1: (1, [("x", "<f2")]),
    2: (32, [("scale", "<f2"), ("nibbles", "u1", 16)]),
    3: (32, [("scale", "<f2"), ("least", "<f2"), ("nibbles", "u1", 16)]),
    8: (32, [("scale", "<f2"), ("x", "i1", 32)]),
    30: (1, [("x", "<u2")]),
}  # fmt: skip
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class File(NamedTuple):
    """What a GGUF file says, and its tensors in float32, by their names there."""

    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read(path: Path) -> File:
    """All of a GGUF file, versions 2 and 3.

    Raises:
        ValueError: it is no such file, or holds tensors of other types.
    """
    raw, at = np.memmap(path, np.uint8, "r"), 4
    if bytes(raw[:4]) != b"GGUF":
        raise ValueError(f"{path.name} is no GGUF file")

    def number(code: str) -> Any:
        nonlocal at
        size = struct.calcsize(code)
        at += size
        return struct.unpack("<" + code, raw[at - size : at].tobytes())[0]

    def word() -> str:
        nonlocal at
        size = number("Q")
        at += size
        return raw[at - size : at].tobytes().decode()

    def value(kind: int) -> Any:
        if kind == ARRAY:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return word() if kind == STRING else number(SCALARS[kind])

    if (version := number("I")) not in (2, 3):
        raise ValueError(f"{path.name} is of version {version}; versions 2 and 3 are read")
    num_tensors, num_values = number("Q"), number("Q")
    metadata = {word(): value(number("I")) for _ in range(num_values)}
    places = {}
    for _ in range(num_tensors):
        name = word()
        shape = [number("Q") for _ in range(number("I"))][::-1]
        places[name] = (shape, number("I"), number("Q"))
    step = metadata.get("general.alignment", 32)
    data = raw[-(-at // step) * step :]
    return File(metadata, {name: dequantize(data, *place) for name, place in places.items()})


def dequantize(data: np.ndarray, shape: list[int], kind: int, offset: int) -> np.ndarray:
    """A tensor in float32: x = scale · q + least, the low nibbles of a block before the high."""
    if kind not in BLOCKS:
        raise ValueError(f"tensors of type {kind} are not read, only {sorted(BLOCKS)}")
    count, fields = BLOCKS[kind]
    layout = np.dtype(fields)
    number = int(np.prod(shape)) // count
    blocks = data[offset : offset + number * layout.itemsize].view(layout)
    if kind == 30:
        return (blocks["x"].astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if "nibbles" in layout.names:
        packed = blocks["nibbles"]
        x = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
        x = x if "least" in layout.names else x - 8
    else:
        x = blocks["x"].reshape(number, -1).astype(np.float32)
    if "scale" in layout.names:
        x *= blocks["scale"].astype(np.float32)[:, None]
    if "least" in layout.names:
        x += blocks["least"].astype(np.float32)[:, None]
    return x.reshape(shape)


def to_folder(path: Path, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` (float32) and `tokenizer.json`.

    Raises:
        ValueError: the file is no Llama, or its vocabulary no byte-level BPE.
    """
    from safetensors.numpy import save_file

    said, stored = read(path)
    if said["general.architecture"] != "llama" or said["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(
            f"{path.name} is a {said['general.architecture']} with a vocabulary of kind "
            f"{said['tokenizer.ggml.model']}; only llama with gpt2's kind (byte-level BPE) is read"
        )
    own = {key.removeprefix("llama."): value for key, value in said.items()}
    heads = own["attention.head_count"]
    groups = own.get("attention.head_count_kv", heads)
    tensors = {}
    for name, tensor in stored.items():
        parts = name.split(".")
        if parts[0] != "blk":
            tensors[f"{OUTER[parts[0]]}.weight"] = tensor
            continue
        if parts[2] in ("attn_q", "attn_k"):
            tensor = straight(tensor, heads if parts[2] == "attn_q" else groups)
        tensors[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"] = tensor
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "vocab_size": len(said["tokenizer.ggml.tokens"]), "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"], "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads, "num_key_value_heads": groups,
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
        "rope_theta": own.get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": said.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": said.get("tokenizer.ggml.eos_token_id"), "torch_dtype": "float32",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_of(said).save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # Last: a folder with it is whole.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def straight(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys, rotary pairs half a head apart instead of side by side."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def tokenizer_of(said: dict[str, Any]) -> Any:
    """The byte-level BPE of the file; SmolLM's takes digits one by one."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    words = said["tokenizer.ggml.tokens"]
    pairs = [tuple(merge.split(" ", 1)) for merge in said["tokenizer.ggml.merges"]]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    one_by_one = said.get("tokenizer.ggml.pre") in ("smollm", "refact", "starcoder")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, bytes_of] if one_by_one else [bytes_of]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = said.get("tokenizer.ggml.token_type", [])
    control = [word for word, kind in zip(words, kinds, strict=False) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in control])
    return tokenizer


if __name__ == "__main__":
    to_folder(Path(sys.argv[1]), Path(sys.argv[2]))
