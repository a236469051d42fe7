"""A hundred thousand damaged files from others: model configs, tokenizers, chat templates, adapters' JSON."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplus_jax import LoRAPlusConfig, save_adapter
from loraplus_jax._utils import untrusted
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.data.chat_template import PLAIN, ChatTemplate
from loraplus_jax.data.chat_tokens import find_answers
from loraplus_jax.inference.predict import settings_and_task
from loraplus_jax.interop.peft_files import peft_config
from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.checkpoints.hf import load_config
from loraplus_jax.models.gpt2.config import GPT2Config
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.tokenizer import read_chat_template, special_tokens, stop_ids, tokenizer
from loraplus_jax.settings.schema import DataSettings, ModelSettings, Settings
from loraplus_jax.tasks.causal_lm import LanguageTask
from loraplus_jax.training.saved_adapter import read_notes, saved_config

from ..data.chats import CHATML, INST, MARKED, chat
from .damage import JSON_KEYS, JSON_VALUES, check, damaged, data_limit, peak_limit, words
from .test_headers import CONFIG, json_writer

pytestmark = pytest.mark.slow

SIZES = ("1000000000", "1000000000000", "18446744073709551615", "9" * 30, "1e9", "3", "16", "true", '"silu"')
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "sliding_window": 4,
    "layer_types": ["full_attention"],
    "eos_token_id": 2,
    "max_window_layers": 4,
}
GEMMA3 = LLAMA | {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 1e4,
    "rope_scaling": None,
    "final_logit_softcapping": 30.0,
}
PHI3 = LLAMA | {
    "model_type": "phi3",
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 8,
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
}
GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    **dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions"), 4),
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "hidden_size": None,
    "eos_token_id": 2,
}
KINDS = words('"linear" "dynamic" "yarn" "llama3" "mistral" "qwen2" "qwen3" "bert" "roberta"')


FAMILIES = [(BertConfig, CONFIG), *((LlamaConfig, c) for c in (LLAMA, GEMMA3, PHI3)), (GPT2Config, GPT2)]


@pytest.mark.parametrize(("family", "content"), FAMILIES)
def test_model_configs(tmp_path, family, content):
    """Beside weights of four layers, none of which is wider than 16."""
    save_file(
        {f"layers.{n}.fc.weight": np.ones((16, 4), np.float32) for n in range(4)},
        tmp_path / "model.safetensors",
    )
    values = (*JSON_VALUES, *SIZES * 3, *KINDS * 2)
    make = json_writer(tmp_path / "config.json", content, values=values, keys=(*JSON_KEYS, *content))

    def read():
        config = family.from_hf(load_config(tmp_path))
        assert config.num_hidden_layers <= 4
        assert config.vocab_size <= 16
        assert config.max_length <= 2**60
        if family is LlamaConfig:
            for rope in config.rope(jnp.zeros((1, 2), jnp.int32)):
                assert rope.cos.shape == (1, 2, config.rotary_size // 2)

    (tmp_path / "config.json").write_text(json.dumps(content))
    read()  # compiles
    check(20_000, make, read, limit=peak_limit, names="config.json|Config")


def part(kind, **fields):
    return {"type": kind, **fields}


TOKENIZER = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    },
    "added_tokens": [
        {"id": n, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for n, text in enumerate(("[PAD]", "[CLS]"))
    ],
    "normalizer": part(
        "Sequence",
        normalizers=[
            *(part("NFKC"), part("Prepend", prepend="_"), part("Strip", strip_left=True, strip_right=True)),
            *(part("Replace", pattern={"String": " "}, content="_"), part("Lowercase")),
            part("Replace", pattern={"Regex": "a+"}, content="aa"),
        ],
    ),
    "pre_tokenizer": part(
        "Sequence",
        pretokenizers=[
            part("Split", pattern={"Regex": r"\s+|\w+"}, behavior="Isolated", invert=False),
            part("Digits", individual_digits=True),
            part("Metaspace", replacement="_", prepend_scheme="always", split=True),
            part("FixedLength", length=5),
            part("ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True),
        ],
    ),
    "post_processor": part(
        "TemplateProcessing",
        single=[{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        pair=[{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        special_tokens={"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}},
    ),
    "decoder": part(
        "Sequence",
        decoders=[
            *(part("Replace", pattern={"String": "_"}, content=" "), part("ByteFallback"), part("Fuse")),
            *(part("Strip", content=" ", start=1, stop=0), part("WordPiece", prefix="##", cleanup=True)),
        ],
    ),
    "model": part(
        "BPE",
        dropout=None,
        unk_token=None,
        continuing_subword_prefix=None,
        end_of_word_suffix=None,
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=False,
        vocab={"[PAD]": 0, "[CLS]": 1, "a": 2, "b": 3, "ab": 4},
        merges=[["a", "b"]],
    ),
}
PARTS = (
    *words(
        '"WordPiece" "Unigram" "WordLevel" "BPE" "CTC" "Precompiled" "BertNormalizer" "##" "ByteFallback"'
    ),
    *words('"Whitespace" "MergedWithPrevious" "/////w==" "(a+)+$" "((" ""'),
    *(json.dumps("a" * 5000), json.dumps([part("Replace", pattern={"String": "a"}, content="a" * 100)] * 5)),
)


def test_tokenizers(tmp_path):
    content = json.loads(json.dumps(TOKENIZER))
    values = (*JSON_VALUES, *SIZES, *PARTS * 2)
    make = json_writer(
        tmp_path / "tokenizer.json", content, values=values, keys=(*JSON_KEYS, "type", "content")
    )
    # Damage is counted for the main process; a child process has a limit of its own.
    check(20_000, make, lambda: tokenizer(tmp_path).encode("ab Ab 12 é"), limit=peak_limit, names="tokenizer")


def test_tokenizer_configs(tmp_path):
    content = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "pad_token": None,
        "chat_template": [{"name": "default", "template": "{{ x }}"}, {"name": "other", "template": "y"}],
    }
    make = json_writer(tmp_path / "tokenizer_config.json", content, keys=(*JSON_KEYS, *content))

    def read():
        special_tokens(tmp_path)
        read_chat_template(tmp_path)
        stop_ids(tmp_path)

    check(15_000, make, read, limit=data_limit, names="tokenizer_config.json")


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
    *words("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }} | {% set m = namespace() %}", " | "),
    *words("{% include 'x' %} | {% import 'os' as os %} | {% extends 'x' %}", " | "),
    *(
        "|",
        "**",
        "~",
        "{% endif %}",
        "{{ raise_exception('\\n') }}",
        "\ufdd0",
        "\ufdd1",
        "\ud800",
        "\0",
        "é😀",
        "[[" * 500,
    ),
)


def test_templates(monkeypatch):
    monkeypatch.setattr(untrusted, "SECONDS", 1)
    sources = [PLAIN, CHATML, INST, MARKED]
    conversation = chat("Add <b>.", "3", "And é😀?", "4")
    current = [""]

    def make(rng):
        source = rng.choice(sources)
        if rng.randrange(2):
            source = damaged(rng, source.encode()).decode(errors="replace")
        else:
            for _ in range(rng.choice((1, 1, 2))):
                at = rng.randrange(len(source))
                source = source[:at] + rng.choice(SCRAPS) + source[at + rng.choice((0, 0, 5)) :]
        current[0] = source
        return source.encode(errors="surrogatepass")

    def read():
        find_answers(ChatTemplate(current[0], "toy.json", "<s>", "</s>"), conversation)

    check(20_000, make, read, limit=peak_limit, names="toy.json")


EVIL = words(r'"(([a-z]+)*)*!" "(" ".*" "(?i)[a-z]+" "a{99999999999}" "(?P<a>.)(?P=a)" "all-linear"')


def test_the_options_of_a_peft_adapter(tmp_path):
    names = [f"base_model.model.layers.{n}.{m}.lora_{x}.weight" for n in range(2) for m in "qv" for x in "AB"]
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q", "v"],
        "exclude_modules": "x.*",
        "rank_pattern": {"layers.0.q": 2},
        "bias": "none",
        "alpha_pattern": {"v": 3},
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    values = (*JSON_VALUES, *SIZES, *EVIL * 2)
    make = json_writer(
        tmp_path / "adapter_config.json", content, values=values, keys=(*JSON_KEYS, *content, "a+")
    )
    rules = [("layers/{m}", "layers.{n}.{m}")]
    check(
        15_000, make, lambda: peft_config(tmp_path, rules), limit=peak_limit, names=re.escape(str(tmp_path))
    )


def test_the_description_of_an_adapter_of_a_run(tmp_path):
    spec = AdapterSpec(leaf="params/q/kernel", kind="dense", axes="io", shape=(4, 3), rank=2, scale=8.0)
    factors = {"q": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 3))}}
    settings = Settings(model=ModelSettings(path="m"), data=DataSettings(path="d"), output_dir="out")
    task = LanguageTask(kind="instruction", template="{{ x }}").notes()
    config = LoRAPlusConfig(target_modules="q", rank=2, rank_pattern={"q": 2})
    save_adapter(tmp_path / "a", factors, {"q": spec}, config, settings=settings.to_json(), task=task)
    path = tmp_path / "a/adapter.json"
    values = (*JSON_VALUES, *SIZES, *EVIL, '"/etc/passwd"')
    make = json_writer(path, json.loads(path.read_text()), values=values, keys=(*JSON_KEYS, "kind", "names"))

    def read():
        notes = read_notes(tmp_path / "a")
        saved_config(tmp_path / "a")
        if {"settings", "task"} <= notes.keys():
            settings_and_task(tmp_path / "a", notes)

    check(10_000, make, read, limit=peak_limit, names=re.escape(str(tmp_path)))
