"""A tuned model as a directory that transformers loads: shards of safetensors, `config.json`, tokenizer files.

It is written tensor by tensor; see `merged`. For PEFT the path map of a model is made here from its name table, so
that names stand in one place.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..interop.path_map import PathMap, torch_module_of
from ..interop.peft_config import raise_problems
from ..interop.peft_modules_to_save import name_leaves, slice_leaves
from ..tree import flatten
from . import tokenizer
from .bert import Pooling
from .bert_config import BertConfig
from .gguf import load as gguf
from .hf import INDEX_FILE, SINGLE_FILE, load_config
from .llama_config import LlamaConfig
from .merged import TYPES, CheckpointMerge, OutputTensor, merged_tensors
from .name_table import NameTable

SHARD_BYTES = 5 * 10**9
"""A file's size, as transformers has it."""
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
_HEADS = ("lm_head", "classifier")
_CAUSAL = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_ENCODERS = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}


class TransformersClass(NamedTuple):
    """The class of transformers that a model is one of.

    Attributes:
      architecture: its name.
      prefix: before the names of all modules but the heads.
      heads: rules for parts that the name table does not know, or knows by another name.
      task_type: PEFT's name of what it is for.
      tied: the modules of ours whose embedding is the head too.
    """

    architecture: str
    prefix: str
    heads: tuple[tuple[str, str], ...]
    task_type: str | None
    tied: tuple[str, ...] = ()


def causal_lm_class(config: LlamaConfig) -> TransformersClass:
    """That of a language model."""
    tied = ("embed_tokens",) if config.tie_word_embeddings else ()
    return TransformersClass(f"{_CAUSAL[config.model_type]}ForCausalLM", "model.", (), "CAUSAL_LM", tied)


def encoder_class(config: BertConfig, pooling: Pooling) -> TransformersClass:
    """That of an encoder with a head: for sequences where transformers has the same head, else the bare encoder.

    BERT's head there stands on the pooler; RoBERTa's has a layer like a pooler in it. Neither takes a mean or the
    bare first token.
    """
    name = _ENCODERS[config.model_type]
    if pooling != "pooler":
        return TransformersClass(f"{name}Model", "", (), "FEATURE_EXTRACTION")
    if config.model_type == "bert":
        return TransformersClass(
            f"{name}ForSequenceClassification", "bert.", (("head", "classifier"),), "SEQ_CLS"
        )
    heads = (("pooler", "classifier.dense"), ("head", "classifier.out_proj"))
    return TransformersClass(f"{name}ForSequenceClassification", "roberta.", heads, "SEQ_CLS")


def path_map(table: NameTable, form: TransformersClass, *, prefix: str | None = None) -> PathMap:
    """Where the modules of a model are in transformers' class of it.

    Args:
      table: the model's name table.
      form: the class.
      prefix: another one than the form's, for adapters of the same model without its head.
    """
    rules: dict[tuple[str, str], tuple[str, str] | tuple[str, str, str]] = {
        (ours, theirs): (ours, theirs) for ours, theirs in form.heads
    }
    head_modules = {ours for ours, _ in form.heads}
    prefix = form.prefix if prefix is None else prefix
    for rule in table.rules:
        (ours, _, leaf), name = rule.path.rpartition("/"), rule.name.rpartition(".")[0]
        theirs = name if name.split(".")[0] in _HEADS else prefix + name
        if leaf == "embedding":
            rules[ours, theirs] = (ours, theirs, "TiedEmbedding" if ours in form.tied else "Embedding")
        elif ours not in head_modules:
            rules[ours, theirs] = (ours, theirs)
    rules |= {(ours, "lm_head"): (ours, "lm_head", "TiedHead") for ours in form.tied}
    return tuple(rules.values())


def write_hf(
    target: Path,
    source: Path,
    merge: CheckpointMerge,
    form: TransformersClass,
    *,
    new: Mapping[str, Any],
    config: Mapping[str, Any],
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a merged model into an empty directory.

    Args:
      target: the directory.
      source: the base, a Hugging Face directory or a GGUF file.
      merge: what becomes of its tensors.
      form: the class that loads it.
      new: what no file has, `{"params": {"head": ...}}`, and the form has a place for.
      config: fields that `config.json` gets beside the base's.
      dtype: what weights are kept in, merged in float32 whichever it is; by default what each was kept in, and
        float32 for what was quantised.
      shard_bytes: of a file, at most, unless one tensor has more.

    Raises:
      ValueError: the base has something that transformers has no name for.
    """
    tensors = list(_named_tensors(source, merge, form, new))
    if dtype is not None:
        tensors = [dataclasses.replace(t, dtype=np.dtype(dtype)) if is_float(t.dtype) else t for t in tensors]
    kinds = {t.dtype.name for t in tensors if is_float(t.dtype)}
    content = {**hf_config(source), "architectures": [form.architecture], **config}
    content.pop("torch_dtype", None)
    content["dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    _write_json(target / "config.json", content)
    copy_tokenizer(source, target)
    shards = _shards(tensors, shard_bytes)
    count = len(shards)
    names = (
        [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        if count > 1
        else [SINGLE_FILE]
    )
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(target / name, shard)
    if len(shards) > 1:
        listed = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(map(_size, tensors))
        _write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": listed})


def hf_config(source: Path) -> dict[str, Any]:
    """The base's `config.json`, or what a GGUF file has instead.

    Raises:
      ValueError: the file's rotary factors have no form that transformers reads.
    """
    config = dict(load_config(source))
    if (config.get("rope_scaling") or {}).get("rope_type") == "factors":
        raise ValueError(
            f"{source} keeps its rotary frequencies as factors, of which transformers' config has no form; "
            "export it with --format gguf"
        )
    return config


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files, or writes them from a GGUF file's metadata."""
    if (file := gguf.find(source)) is None:
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        return
    converted = tokenizer.tokenizer(file)
    converted.save(str(target / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= tokenizer.special_tokens(file)
    if (template := tokenizer.read_chat_template(file)) is not None:
        settings["chat_template"] = template
    _write_json(target / "tokenizer_config.json", settings)
    if ends := tokenizer.stop_ids(file):
        _write_json(target / "generation_config.json", {"eos_token_id": list(ends)})


def write_safetensors(path: Path, tensors: Iterable[OutputTensor]) -> None:
    """Writes a safetensors file tensor by tensor: the library's own writer needs all of them in memory.

    The format: https://github.com/huggingface/safetensors#format
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, end = {np.dtype(dtype): name for name, dtype in TYPES.items()}, 0
    for tensor in tensors:
        start, end = end, end + _size(tensor)
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for rows in tensor.rows():
                # As bytes: bfloat16 is no type that a file takes.
                file.write(np.ascontiguousarray(rows, tensor.dtype).reshape(-1).view(np.uint8).data)


def _named_tensors(
    source: Path, merge: CheckpointMerge, form: TransformersClass, new: Mapping[str, Any]
) -> Iterator[OutputTensor]:
    """Yields all tensors under the names of transformers' class.

    A bare encoder and a language model keep their file's names and whatever else the file has, but for a second
    copy of a tied head. A model with a new head gets the class's names, and loses the file's old heads.
    """
    rules = path_map(merge.table, form)
    for tensor, canonical in merged_tensors(source, merge):
        if not form.heads:
            if canonical not in dict(merge.table.copies):
                yield tensor
        elif canonical in merge.places:
            rule, layer = merge.places[canonical]
            location = torch_module_of(rules, rule.path.rpartition("/")[0])
            assert location is not None
            name = location.at(() if layer is None else (layer,))
            yield dataclasses.replace(tensor, name=f"{name}.{canonical.rpartition('.')[2]}")
    slots, problems = slice_leaves(flatten(new), rules)
    raise_problems(f"the model has no place in {form.architecture} for what is new", problems)
    for name, array in name_leaves(slots, set(), rules)[0].items():
        yield OutputTensor(name, array.shape, array.dtype, lambda array=array: iter([array]))


def is_float(dtype: np.dtype) -> bool:
    """Whether numbers of a type are floating-point ones, bfloat16 included."""
    return jnp.issubdtype(dtype, jnp.floating)


def _size(tensor: OutputTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _shards(tensors: Iterable[OutputTensor], most: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + _size(tensor) > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _size(tensor)
    return shards


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
