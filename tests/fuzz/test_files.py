"""Damaged files of every format that others may write: weights, configs, tokenizers, templates, adapters, data."""

import csv
import io
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import save, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from loraplus_jax import LoRAPlusConfig, load_adapter, save_adapter
from loraplus_jax._utils import untrusted
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.data.chat_template import PLAIN, ChatTemplate
from loraplus_jax.data.chat_tokens import find_answers
from loraplus_jax.data.options import DataOptions
from loraplus_jax.data.readers import read_rows
from loraplus_jax.inference.tuned_model import settings_and_task
from loraplus_jax.interop.peft_files import peft_config
from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.checkpoints.gguf import header
from loraplus_jax.models.checkpoints.hub_directory import SINGLE_FILE
from loraplus_jax.models.checkpoints.name_table import NameTable, Rule, embedding_rules, linear_rules
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.files import open_files
from loraplus_jax.models.gpt2.config import GPT2Config
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.modernbert.config import ModernBertConfig
from loraplus_jax.models.options import ModelOptions
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.schema import Settings
from loraplus_jax.tasks.causal_lm import LanguageTask
from loraplus_jax.training.place import look
from loraplus_jax.training.saved_adapter import saved_config

from .. import tiny
from ..data.chats import CHATML, chat
from ..models.checkpoints.gguf.files import metadata, write
from .damage import BYTES, JSON_KEYS, JSON_VALUES, check, damaged, data_limit, odd_json, peak_limit, words

pytestmark = pytest.mark.slow


class Target(NamedTuple):
    """A file to damage and its reader.

    Attributes:
      path: the file.
      data: what it holds undamaged, which `read` reads.
      odd: called with a random generator: contents of the right form with something wrong in them.
      read: reads the file.
      limit: `data_limit` or `peak_limit`.
      names: a regular expression that finds the file in the message of an error; by default its name.
      end: where the part of it that is damaged ends.
    """

    path: Path
    data: bytes
    odd: Callable
    read: Callable
    limit: Callable = data_limit
    names: str | None = None
    end: int | None = None


def of_json(path, tree, read, values=JSON_VALUES, keys=JSON_KEYS, **options):
    """A JSON file with one place of it wrong."""

    def odd(rng):
        return odd_json(rng, tree, values, (*keys, *tree)).encode(errors="surrogatepass")

    return Target(path, json.dumps(tree).encode(), odd, read, **options)


DTYPES = tuple(f'"{name}"' for name in words("F64 F16 BF16 I64 U8 BOOL F8_E4M3 F4 C64 f32"))
OFFSETS = words("[0,0] [0,4] [8,4] [-4,0] [0,18446744073709551615] [1e3,2e3] [0] [4,1e999]")
SHAPES = words("[0] [] [1] [-1,3] [9223372036854775807,4] [4294967296,4294967296] [1,1,1,1,3]")


def of_safetensors(path, data, read):
    """A header wrong as JSON, in its values, or in the length before it."""
    end = 8 + int.from_bytes(data[:8], "little")

    def odd(rng):
        text = odd_json(rng, json.loads(data[8:end]), (*JSON_VALUES, *DTYPES, *OFFSETS, *SHAPES))
        header = text.encode(errors="surrogatepass")
        told = len(header)
        if not rng.randrange(4):
            told = rng.choice((0, 1, told - 1, told + 1, len(data), 10**8, 2**31, 2**63, 2**64 - 1))
        return told.to_bytes(8, "little") + header + data[end:]

    return Target(path, data, odd, read, names=re.escape(str(path.parent)), end=end)


TABLE = NameTable(
    rules=(*embedding_rules("tok", "embed"), *linear_rules("h.{layer}.fc", "up", bias=False)),
    ignore=("h.0.mask",),
)
LEAVES = {"embed": {"embedding": (5, 3)}, "up": {"kernel": (2, 3, 4)}}
EXPECTED = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32), LEAVES, is_leaf=lambda x: isinstance(x, tuple)
)
FIRST = {"tok.weight": np.ones((5, 3), np.float16), "h.0.mask": np.ones((2, 2), bool)}
SECOND = {f"h.{layer}.fc.weight": np.ones((4, 3), np.float32) for layer in range(2)}


def load(directory):
    return load_params(open_files(directory), TABLE, EXPECTED, place=lambda path, array: array)


def weights(folder):
    return of_safetensors(folder / SINGLE_FILE, save(FIRST | SECOND, {"format": "pt"}), lambda: load(folder))


HUGE = (*words("1000000000 1000000000000 18446744073709551615 1e9 3 16 true"), "9" * 30, '"silu"')
KINDS = (
    *words('"linear" "yarn" "longrope" "llama3" "mistral" "qwen3" "olmo3" "smollm3" "mixtral"'),
    *words('"bert" "roberta" "modernbert"'),
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = {"hidden_act": "silu", "num_key_value_heads": 2, "rope_theta": 1e4, "attention_bias": False}
LLAMA |= {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}, "sliding_window": 4}
LLAMA |= {"layer_types": ["full_attention"], "eos_token_id": 2}
LLAMA |= {"max_position_embeddings": 64, "no_rope_layers": [1, 1, 1, 0]}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
GEMMA3 = {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 1e4, "rope_scaling": None}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 30.0}
BERT = {"hidden_act": "gelu", "is_decoder": False, "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1}
MODERNBERT = {"hidden_activation": "gelu", "layer_types": ["full_attention", "sliding_attention"] * 2}
MODERNBERT |= {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "norm_bias": False}
MODERNBERT |= {"classifier_pooling": "mean", "global_attn_every_n_layers": 3, "num_attention_heads": 2}
GPT2 = {"activation_function": "gelu_new", "scale_attn_weights": True, "tie_word_embeddings": True}
GPT2 |= {"scale_attn_by_inverse_layer_idx": False, "eos_token_id": 2}
CONFIGS = {
    "bert": (BertConfig, BERT),
    "modernbert": (ModernBertConfig, MODERNBERT),
    "llama": (LlamaConfig, LLAMA),
    "gemma3_text": (LlamaConfig, LLAMA | GEMMA3),
    "qwen3_moe": (LlamaConfig, LLAMA | {"mlp_only_layers": [], "num_experts": 4}),
    "phi3": (LlamaConfig, LLAMA | {"original_max_position_embeddings": 8, "rope_scaling": LONG}),
    "gpt2": (GPT2Config, GPT2),
}


def model_config(kind):
    def prepare(folder):
        family, options = CONFIGS[kind]
        content = tiny.config(kind, **dict.fromkeys(tiny.SIZES, 4) | {"head_dim": 4} | options)
        content |= {"rope_scaling": None} if kind == "gemma3_text" else {}

        def read():
            config = family.from_hf(open_files(folder).config)
            assert config.num_hidden_layers <= 1000
            assert config.vocab_size <= 2**24
            assert config.max_length <= 2**60
            if family is LlamaConfig:
                for rope in config.rope(jnp.zeros((1, 2), jnp.int32)):
                    assert rope.cos.shape == (1, 2, config.rotary_size // 2)

        path, values = folder / "config.json", (*JSON_VALUES, *HUGE * 3, *KINDS * 2)
        return of_json(path, content, read, values, limit=peak_limit, names="config.json|Config")

    return prepare


PARTS = (
    *words('"WordPiece" "Unigram" "WordLevel" "BPE" "CTC" "Precompiled" "BertNormalizer" "##"'),
    *words('"ByteFallback" "Whitespace" "MergedWithPrevious" "/////w==" "(a+)+$" "((" ""'),
    *(json.dumps("a" * 5000), '[{"type": "Prepend", "prepend": "' + "a" * 500 + '"}]'),
)


def tokenizer_file(folder):
    """Every kind of part; the child process that tries it has a limit of its own."""
    own = Tokenizer(models.BPE({"[PAD]": 0, "[CLS]": 1, "a": 2, "b": 3, "ab": 4}, [("a", "b")]))
    n, p, d = normalizers, pre_tokenizers, decoders
    replaced = [n.Replace(" ", "_"), n.Lowercase(), n.Replace(Regex("a+"), "aa")]
    own.normalizer = n.Sequence([n.NFKC(), n.Prepend("_"), n.Strip(), *replaced])
    cuts = [p.Split(Regex(r"\s+|\w+"), "isolated"), p.Digits(True), p.Metaspace("_"), p.FixedLength(5)]
    own.pre_tokenizer = p.Sequence([*cuts, p.ByteLevel(add_prefix_space=False)])
    own.post_processor = processors.TemplateProcessing("[CLS] $A", "$A $B:1", [("[CLS]", 1)])
    joined = [d.Fuse(), d.Strip(" ", 1, 0), d.WordPiece()]
    own.decoder = d.Sequence([d.Replace("_", " "), d.ByteFallback(), *joined])
    own.add_special_tokens(["[PAD]", "[CLS]"])
    own.enable_truncation(8)
    own.enable_padding(length=8)
    values, tree = (*JSON_VALUES, *HUGE, *PARTS * 2), json.loads(own.to_str())

    def read():
        open_files(folder).tokenizer.encode("ab Ab 12 é")

    return of_json(folder / "tokenizer.json", tree, read, values, limit=peak_limit, names="tokenizer")


def tokenizer_config(folder):
    templates = [{"name": "default", "template": "{{ x }}"}, {"name": "other", "template": "y"}]
    tree = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "pad_token": None,
        "chat_template": templates,
    }

    def read():
        files = open_files(folder)
        assert [files.special_tokens, files.chat_template, files.stop_ids]

    return of_json(folder / "tokenizer_config.json", tree, read)


SCRAPS = (
    *words(
        "{% | %} | {{ | }} | {# | {% raw %} | {% generation %} | {% endgeneration %} | {% endfor %}", " | "
    ),
    *words("{% for x in range(99999) %} | {% for x in messages recursive %} | {% set messages = 3 %}", " | "),
    *words(
        "{{ 'x'|center(10**9) }} | {{ 'x' * 10**8 }} | {{ 9**9**9 }} | {{ '%999999999d'|format(1) }}", " | "
    ),
    *words(
        "{{ messages.__class__ }} | {{ cycler.__init__.__globals__ }} | {{ self }} | {{ lipsum(n=9) }}", " | "
    ),
    *words("{{ loop(1) }} | {{ m.content|list }} | {{ messages|tojson(indent=9) }} | ((", " | "),
    *words(
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }} | {% set m = namespace() %} | {% endif %}", " | "
    ),
    *words("{% include 'x' %} | {% import 'os' as os %} | {% extends 'x' %}", " | "),
    *("|", "**", "~", "{{ raise_exception('\\n') }}", "\ufdd0", "\ufdd1", "\ud800", "\0", "é😀", "[[" * 500),
)


def template(source):
    def prepare(folder):
        path, conversation = folder / "toy.jinja", chat("Add <b>.", "3", "And é😀?", "4")

        def odd(rng):
            text = source
            for _ in range(rng.choice((1, 1, 2))):
                at = rng.randrange(len(text))
                text = text[:at] + rng.choice(SCRAPS) + text[at + rng.choice((0, 0, 5)) :]
            return text.encode(errors="surrogatepass")

        def read():
            text = path.read_bytes().decode(errors="surrogateescape")
            find_answers(ChatTemplate(text, path.name, "<s>", "</s>"), [conversation])

        return Target(path, source.encode(), odd, read, peak_limit)

    return prepare


EVIL = words(r'"(([a-z]+)*)*!" "(" ".*" "(?i)[a-z]+" "a{99999999999}" "(?P<a>.)(?P=a)" "all-linear"')


def peft_options(folder):
    names = [f"base_model.model.layers.{n}.{m}.lora_{x}.weight" for n in range(2) for m in "qv" for x in "AB"]
    save_file({name: np.ones((2, 2), np.float32) for name in names}, folder / "adapter_model.safetensors")
    tree = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    tree |= {"target_modules": ["q", "v"], "exclude_modules": "x.*", "rank_pattern": {"layers.0.q": 2}}
    tree |= {"bias": "none", "alpha_pattern": {"v": 3}, "modules_to_save": None, "use_rslora": False}
    tree |= {"use_dora": False, "a+": None}

    def read():
        peft_config(folder, [("layers/{m}", "layers.{n}.{m}")])

    values, names = (*JSON_VALUES, *HUGE, *EVIL * 2), re.escape(str(folder))
    return of_json(folder / "adapter_config.json", tree, read, values, limit=peak_limit, names=names)


def saved(folder):
    """An adapter of a run, with a trained head."""
    shape, options = (2, 4, 3), {"kind": "dense", "axes": "io", "rank": 2, "scale": 8.0, "stacked": (0,)}
    spec = AdapterSpec(leaf="params/q/kernel", shape=shape, **options)
    factors = {"lora_a": jnp.ones((2, 4, 2)), "lora_b": jnp.zeros((2, 2, 3))}
    settings = Settings(model=ModelOptions(path="m"), data=DataOptions(path="d"), output_dir="out").to_json()
    task = LanguageTask(kind="instruction", template="{{ x }}").notes()
    config = LoRAPlusConfig(target_modules="q", rank=2, rank_pattern={"q": 2})
    trained = {"lora": {"q": factors}, "params": {"head": {"bias": jnp.ones(3)}}}
    save_adapter(folder / "a", trained, {"q": spec}, config, base="0123", settings=settings, task=task)
    return folder / "a"


def adapter_notes(folder):
    directory = saved(folder)

    def read():
        load_adapter(directory)
        place = look(directory)
        saved_config(place)
        if place.kind == "run":
            settings_and_task(place)

    values, keys = (*JSON_VALUES, *HUGE, *EVIL, '"/etc/passwd"'), (*JSON_KEYS, "q/x", "rank", "kind", "names")
    path, limits = directory / "adapter.json", {"limit": peak_limit, "names": re.escape(str(directory))}
    return of_json(path, json.loads(path.read_text()), read, values, keys, **limits)


def adapter_tensors(folder):
    path = saved(folder) / "adapter.safetensors"
    return of_safetensors(path, path.read_bytes(), lambda: load_adapter(path.parent))


BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "c", "abc"],
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ x }}",
}
PIECES = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]}
ODD_NUMBERS = (0, 1, 2, 7, 8, 9, 13, 99, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1)


def gguf_header(tokens):
    """One number of the header, somewhere, put to something extreme; read for weights, config and tokenizer."""

    def prepare(folder):
        path, shapes = folder / "m.gguf", {"token_embd.weight": (8, 32), "blk.0.attn_q.weight": (64, 32)}
        content = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        content |= {"blk.1.ffn_up.weight": np.ones((96, 32), np.float32)}
        content |= {"rope_freqs.weight": np.full(8, 2, np.float32)}
        data = write(path, content, metadata() | BYTE_LEVEL | tokens).read_bytes()
        end = header.read(path).tensors["token_embd.weight"].start
        rules = (Rule("model.embed_tokens.weight", "e"), Rule("model.layers.0.self_attn.q_proj.weight", "q"))
        table = NameTable(rules=rules, ignore=(r"model\.layers\.1\..*",))
        expected = {"e": np.empty((8, 32), np.float32), "q": np.empty((64, 32), np.float32)}

        def odd(rng):
            form, at = rng.choice(("<I", "<Q")), rng.randrange(4, end - 8)
            number = rng.choice(ODD_NUMBERS) % 2 ** (8 * struct.calcsize(form))
            return data[:at] + struct.pack(form, number) + data[at + struct.calcsize(form) :]

        def read():
            assert open_files(path).config
            load_params(open_files(path), table, expected, place=lambda path, array: array)
            files = open_files(path)
            assert files.tokenizer
            assert [files.special_tokens, files.chat_template]

        return Target(path, data, odd, read, end=end)

    return prepare


LAUGHS = "[&a [x, x, x, x, x, x, x, x, x], " + ", ".join(
    f"&{chr(n + 1)} [{', '.join(['*' + chr(n)] * 9)}]" for n in range(ord("a"), ord("a") + 9)
)
ODD_YAML = (
    *words("~ true on '' x .. é😀 -1 0 3 2.5 1e3 .inf .nan 1e400 -1e-400 0x 0b_ 0o9 1:2:3 1_0 5e-4"),
    *("", '"\\ud800"', '"\\0"', "9" * 30, "9" * 400, "9" * 5000, "2001-01-01", "2001-99-99", "=", "\tx"),
    *(
        "2001-01-01 25:00:00",
        "0001-01-01 00:00:00 +23:59",
        "<<: x",
        "|\n   x",
        "null\nmore: 1",
        "1\n---\nmodel: 2",
    ),
    *words("[] | {} | [x, 1] | {a: b} | {[a]: b} | {{a: b}: c} | [null] | [[x]] | {1: 2, 1: 3}", " | "),
    *words("{<<: {a: 1}} | !!int '' | !!int x | !!float x | !!bool x | !!null x | !!timestamp x", " | "),
    *words("!!binary é | !!set [a] | !!omap x | !!pairs [a] | !!str [a] | !!python/name:os.system", " | "),
    *words("!!python/object/apply:os.mkdir [made] | !<tag:yaml.org,2002:python/module:os> x | !x y", " | "),
    *words("*gone | &a [*a] | &a {x: *a} | %x | @ | `", " | "),
    *(LAUGHS + "]", "# x", "x # y", "'x", '"x', "x: y: z", "- x\n" * 500, "x" * 20_000),
    *("[" * n + "]" * n for n in (50, 90, 150, 300, 3000)),
    *("{a: " * n + "1" + "}" * n for n in (50, 90, 150, 300)),
)
ODD_KEYS = words("1 | true | null | 2001-01-01 | 1.5 | ~ | '' | [a] | {a: b} | << | model | lora", " | ")
ODD_KEYS += words("*a | &a b | ? x | é", " | ")
QUICKSTART = (Path(__file__).parents[2] / "configs/quickstart.yaml").read_bytes()


def run_config(folder):
    """YAML that no config needs; the quickstart's, and one with each field of each section."""
    path, quickstart = folder / "config.yaml", yaml.safe_load(QUICKSTART)
    content = Settings(model=ModelOptions(path="m"), data=DataOptions(path="d"), output_dir="out").to_json()
    for key, value in quickstart.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    short = [line for line in QUICKSTART.decode().splitlines() if not line.startswith("#")]

    def odd(rng):
        """One line's value, key or indent replaced by something else, or a line too many or too few."""
        lines = list(rng.choice((short, yaml.safe_dump(content).splitlines())))
        at = rng.randrange(len(lines))
        name, _, value = lines[at].partition(":")
        indent = name[: len(name) - len(name.lstrip())]
        what = rng.choice(("value", "value", "value", "value", "key", "more", "gone", "twice"))
        lines[at : at + 1] = {
            "value": [f"{name}: {rng.choice(ODD_YAML)}"],
            "key": [f"{indent}{rng.choice(ODD_KEYS)}:{value}"],
            "more": [f"{indent}{rng.choice(ODD_KEYS)}: {rng.choice(ODD_YAML)}", lines[at]],
            "twice": [lines[at]] * 2,
            "gone": [],
        }[what]
        return "\n".join(lines).encode()

    return Target(path, QUICKSTART, odd, lambda: parse_settings(path), names="")


TEXTS = ("One, two", 'He said "so".', "two\nlines", "é😀", " tail ", "\tx", "a" * 300)
ROWS = [
    {"id": str(n), "text": text, "label": ("good", "bad")[n % 2], "rest": "x"} for n, text in enumerate(TEXTS)
]
NEAR_THE_LIMIT = tuple("[" * n + "]" * n for n in range(880, 1000, 3))
ODD_BYTES = (
    *BYTES,
    *(b"\r\r", b'""', b'"\n', b"\xef\xbb\xbf\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\x0c", b"\x1c"),
    *(b"1" * 5000, b"\n" * 2000, b'"' * 2001, b"," * 2000, b"\x00" * 500, b"a,b\n" * 500),
    *(b'{"text":"a"}\n' * 500, b"x" * 140_000, b'"' + b"x,\n" * 50_000),
    *("é".encode("latin-1"), "text\n".encode("utf-16")),
)


def data_file(suffix, delimiter=""):
    """Scraps where they mean something: at a table's separators, or for a line of JSON."""

    def prepare(folder):
        path, text = folder / f"data.{suffix}", io.StringIO(newline="")
        if delimiter:
            writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        data = text.getvalue().encode() or "\n".join(map(json.dumps, ROWS)).encode()
        ends = [0, len(data), *(n for n, byte in enumerate(data) if byte in b'\n"' + delimiter.encode())]

        def odd_line(rng):
            lines, values = (
                [json.dumps(row).encode() for row in ROWS],
                rng.choice([JSON_VALUES] * 4 + [NEAR_THE_LIMIT]),
            )
            line = rng.randrange(len(lines))
            wrong = odd_json(rng, ROWS[line], values).encode(errors="surrogatepass")
            lines[line] = rng.choice((wrong, wrong, rng.choice(ODD_BYTES)))
            return rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines)

        def odd_table(rng):
            at = rng.choice(ends)
            return data[:at] + rng.choice(ODD_BYTES) + data[at + rng.choice((0, 0, 1)) :]

        def read():
            rows = read_rows(path, ("text", "label"))
            assert all(len(row) == 2 and all(x.strip() and x.encode() for x in row) for _, row in rows)

        return Target(path, data, odd_table if delimiter else odd_line, read)

    return prepare


TARGETS = {
    "weights": (20_000, weights),
    **{f"config of {kind}": (10_000, model_config(kind)) for kind in CONFIGS},
    "tokenizer": (10_000, tokenizer_file),
    "tokenizer config": (5_000, tokenizer_config),
    "template chatml": (5_000, template(CHATML)),
    "template plain": (5_000, template(PLAIN)),
    "options of PEFT": (10_000, peft_options),
    "notes of an adapter": (10_000, adapter_notes),
    "tensors of an adapter": (5_000, adapter_tensors),
    "gguf of bytes": (1_000, gguf_header({})),
    "gguf of pieces": (1_000, gguf_header(PIECES)),
    "run config": (4_000, run_config),
    "csv": (2_000, data_file("csv", ",")),
    "tsv": (2_000, data_file("tsv", "\t")),
    "jsonl": (2_000, data_file("jsonl")),
}
"""How many damaged files, and what prepares a directory for them."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_or_rejected_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.startswith("template"):
        monkeypatch.setattr(untrusted, "SECONDS", 1)
    cases, prepare = TARGETS[name]
    target = prepare(tmp_path)
    path = target.path

    def make(rng):
        """Half of the files get faults of bytes, half are of the right form with odd contents.

        Each is a new file, since some file systems write a file to the disk when its contents are replaced.
        """
        content = target.odd(rng) if rng.randrange(2) else damaged(rng, target.data, target.end)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return content

    path.write_bytes(target.data)
    target.read()  # also compiles
    files = {*tmp_path.rglob("*")}
    names = re.escape(path.name) if target.names is None else target.names
    check(cases, make, target.read, limit=target.limit, names=names)
    assert {*tmp_path.rglob("*")} == files, "a tag of Python's own was obeyed"
