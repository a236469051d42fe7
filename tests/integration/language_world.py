"""What the tiny world of language models is made of: a random Llama with a tokenizer, conversations, questions."""

import itertools
import json

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .. import tiny
from ..models.checkpoints.gguf.files import write as write_gguf

END, TURN, STOP = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red"}
FILLERS = ("the", "a", "this", "that", "tell", "me", "say", "now", "please", "just", "again", "only")
WORDS = ("it", "is", "colour", "what", *COLOURS, *COLOURS.values(), *FILLERS)
HIDDEN, LAYERS, INNER, HEADS, KEY_HEADS, HEAD, POSITIONS = 32, 2, 48, 4, 2, 8, 64
PRODUCTS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chats(count=120):
    """Distinct instructions with one subject each, whose colour is the answer."""
    rng = np.random.default_rng(0)
    rows = {}
    while len(rows) < count:
        subject = list(COLOURS)[len(rows) % len(COLOURS)]
        text = " ".join([*rng.choice(FILLERS, rng.integers(1, 4)), "what", "colour", "is", subject])
        rows[text] = {"instruction": text, "output": f"it is {COLOURS[subject]}"}
    return list(rows.values())


def questions(count=120):
    """The same, with two to four answers to choose from."""
    rng = np.random.default_rng(1)
    rows = []
    for n, row in enumerate(chats(count)):
        wrong = [f"it is {c}" for c in COLOURS.values() if f"it is {c}" != row["output"]]
        choices = rng.permutation([row["output"], *rng.permutation(wrong)[: 1 + n % 3]])
        rows.append({"prompt": row["instruction"], "choices": choices.tolist(), "answer": row["output"]})
    return rows


def descriptions(count=120):
    """Structured inputs with two texts each."""
    rng = np.random.default_rng(3)
    rows = {}
    for subject, colour in itertools.islice(itertools.cycle(COLOURS.items()), count // 2):
        fillers = " ".join(rng.choice(FILLERS, 3))
        mr = f"what[{subject}], colour[{colour}], say[{fillers}]"
        texts = (f"the {subject} is {colour} now", f"say it is {colour} now")
        rows[mr] = [{"mr": mr, "ref": text} for text in texts]
    return [row for pair in rows.values() for row in pair]


def vocabulary():
    """All tokens by their ids, and the merges by which words become one token each, with a space before or not."""
    merges = {}
    for word in (*(f"Ġ{w}" for w in WORDS), *WORDS, "user", "assistant", "system"):
        merges |= {(word[:i], word[i]): None for i in range(1, len(word))}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *alphabet, *dict.fromkeys("".join(pair) for pair in merges)], list(merges)


def write_model(directory, **changes):
    """A Hugging Face directory; `changes` are to its config."""
    tokens, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": TURN, "eos_token": STOP, "pad_token": END}
    (directory / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": TEMPLATE}))
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "head_dim": None,
    }
    sizes |= {
        "num_key_value_heads": KEY_HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
    }
    write_weights(directory, tiny.config(**sizes | {"vocab_size": len(tokens)} | changes))


def write_weights(directory, config):
    """The config and random weights for it."""
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tiny.tensors(config, seed=2)
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"] *= 2  # large enough for a frozen head to be sure of a token
    save_file(tensors, directory / "model.safetensors")


FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def write_family(directory, kind, **changes):
    """The tiny language world's directory with another family's config and random weights."""
    config = json.loads((directory / "config.json").read_text()) | {"model_type": kind}
    write_weights(directory, config | tiny.OPTIONS.get(kind, tiny.DECODER) | changes)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
}


def gguf_tokenizer(bos, eos):
    """The metadata of a GGUF file that hold the tokenizer."""
    tokens, merges = vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.add_bos_token": False,
    }


def write_gguf_of(directory, path, arch="llama", raw=None, **changes):
    """The model of a directory as a GGUF file, float32.

    `raw` replaces tensors by a type and bytes, `changes` are to the metadata, None takes a key out.
    """
    content, raw = {}, raw or {}
    for name, value in load_file(directory / "model.safetensors").items():
        for old, new in GGUF_NAMES.items():
            name = name.replace(old, new)
        name = name.replace("model.layers.", "blk.")
        if ".attn_q." in name or ".attn_k." in name:  # as llama.cpp's converter has it
            heads = HEADS if ".attn_q." in name else KEY_HEADS
            value = value.reshape(heads, 2, HEAD // 2, HIDDEN).swapaxes(1, 2).reshape(value.shape)
        content[name] = np.ascontiguousarray(value)
    values = {
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.context_length": POSITIONS,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KEY_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.chat_template": TEMPLATE,
        **gguf_tokenizer(bos=1, eos=2),
    }
    values = {key: value for key, value in (values | changes).items() if value is not None}
    content |= {name: value for name, (_, value) in raw.items()}
    return write_gguf(path, content, values, arch, {name: kind for name, (kind, _) in raw.items()})
