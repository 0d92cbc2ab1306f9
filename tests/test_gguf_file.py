"""A GGUF file written here, against a dequantization in float64 by hand."""

import struct

import numpy as np
import pytest

import gguf_file
import jaxpattern as jp

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

D, F, HEADS, GROUPS, LAYERS = 32, 64, 4, 2, 2


def word(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(x):
    """A metadata value with its type."""
    if isinstance(x, str):
        return struct.pack("<I", 8) + word(x)
    if isinstance(x, bool):
        return struct.pack("<I?", 7, x)
    if isinstance(x, int):
        return struct.pack("<II", 4, x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    inner = 8 if isinstance(x[0], str) else 4
    items = b"".join(word(i) if inner == 8 else struct.pack("<I", i) for i in x)
    return struct.pack("<IIQ", 9, inner, len(x)) + items


def quantized(rng, shape, kind):
    """Random blocks of a kind, one number at a time, and what they stand for in float64."""
    raw, numbers = b"", []
    for _ in range(int(np.prod(shape)) // (32 if kind else 1)):
        if kind == 0:
            (x,) = np.float32([rng.normal() * 0.1])
            raw += x.tobytes()
            numbers.append(float(x))
            continue
        scale, least = np.float16(rng.uniform(0.01, 0.02)), np.float16(rng.normal() * 0.1)
        if kind == 8:
            q = rng.integers(-128, 128, 32)
            raw += scale.tobytes() + bytes(int(i) & 255 for i in q)
            numbers += [float(scale) * int(i) for i in q]
            continue
        q = rng.integers(0, 16, 32)
        raw += scale.tobytes() + (least.tobytes() if kind == 3 else b"")
        raw += bytes(int(q[i]) | int(q[i + 16]) << 4 for i in range(16))
        shift = float(least) if kind == 3 else -8 * float(scale)
        numbers += [float(scale) * int(i) + shift for i in q]
    return raw, np.float64(numbers).reshape(shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(path of the file, name → tensor in float64)."""
    rng = np.random.default_rng(0)
    words = ["<|end|>", *map(chr, range(33, 127)), "Ġ", "Ġt", "he", "Ġthe"]
    shapes = {"token_embd.weight": ((len(words), D), 8), "output_norm.weight": ((D,), 0)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q.weight": ((D, D), 3), f"blk.{i}.attn_k.weight": ((D // 2, D), 3),
            f"blk.{i}.attn_v.weight": ((D // 2, D), 2), f"blk.{i}.attn_output.weight": ((D, D), 3),
            f"blk.{i}.ffn_gate.weight": ((F, D), 3), f"blk.{i}.ffn_up.weight": ((F, D), 8),
            f"blk.{i}.ffn_down.weight": ((D, F), 3), f"blk.{i}.attn_norm.weight": ((D,), 0),
            f"blk.{i}.ffn_norm.weight": ((D,), 0),
        }  # fmt: skip
    said = {
        "general.architecture": "llama", "llama.block_count": LAYERS, "llama.context_length": 16,
        "llama.embedding_length": D, "llama.feed_forward_length": F,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": GROUPS,
        "llama.rope.freq_base": 500.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] + [1] * (len(words) - 1),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he"],
    }  # fmt: skip
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(said))
    header += b"".join(word(name) + value(x) for name, x in said.items())
    data, tensors = b"", {}
    for name, (shape, kind) in shapes.items():
        raw, tensors[name] = quantized(rng, shape, kind)
        header += word(name) + struct.pack("<I", len(shape))
        header += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        header += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path, tensors


def test_blocks_are_what_they_stand_for(written):
    path, wanted = written
    read = gguf_file.read(path).tensors
    assert set(read) == set(wanted)
    for name, tensor in wanted.items():
        assert read[name].dtype == np.float32
        # One rounding of the product and one of the sum, of numbers of up to 2.6.
        np.testing.assert_allclose(read[name], tensor, rtol=0, atol=4e-7, err_msg=name)


def test_a_folder_loads_with_its_rotary_rows_straight(written, tmp_path):
    """Interleaved pairs 2j, 2j + 1 of a head lie at j and j + K/2 where Hugging Face has them."""
    path, wanted = written
    gguf_file.to_folder(path, tmp_path)
    model = jp.lm.load(tmp_path)
    assert model.spec.tied
    assert (model.spec.num_heads, model.spec.num_kv_heads) == (HEADS, GROUPS)
    width = D // HEADS
    attention = model.params["layers"]["attn"]
    for name, key, heads in (("W_Q", "attn_q", HEADS), ("W_K", "attn_k", GROUPS)):
        for i in range(LAYERS):
            stored = wanted[f"blk.{i}.{key}.weight"]
            for h in range(heads):
                for k in range(width):
                    from_row = h * width + (2 * k if k < width // 2 else 2 * (k - width // 2) + 1)
                    np.testing.assert_allclose(
                        attention[name][i, h, :, k], stored[from_row], rtol=0, atol=4e-7
                    )
    value_rows = wanted["blk.1.attn_v.weight"].reshape(GROUPS, width, D).swapaxes(1, 2)
    np.testing.assert_allclose(attention["W_V"][1], value_rows, rtol=0, atol=4e-7)
    losses = model.loss_fn(model.params, np.arange(12, dtype=np.int32).reshape(2, 6))
    assert np.isfinite(losses).all()


def test_the_vocabulary_is_a_tokenizer(written, tmp_path):
    from tokenizers import Tokenizer

    gguf_file.to_folder(written[0], tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoded = tokenizer.encode("a the 12<|end|>")
    assert encoded.tokens == ["a", "Ġthe", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "a the 12<|end|>"


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "no.gguf"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="no GGUF file"):
        gguf_file.read(path)
    with pytest.raises(ValueError, match="type 14"):
        gguf_file.dequantize(np.zeros(64, np.uint8), [32], 14, 0)
