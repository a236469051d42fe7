"""Templates, tokenizers and patterns of strangers in a child process of bounded time and memory."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from loraplus_jax._utils import untrusted
from loraplus_jax.data.chat_template import PLAIN, ChatTemplate
from loraplus_jax.data.conversations import Turn
from loraplus_jax.models.files import open_files

from ..fuzz.damage import MIB
from ..marks import slow
from ..models.checkpoints.gguf.files import metadata
from ..models.checkpoints.gguf.files import write as write_gguf

DOUBLED = "{{% set n = namespace(s={start}) %}}{{% for i in range(60) %}}"
DOUBLED += "{{% set n.s = n.s {sign} n.s %}}{{% endfor %}}"
TURNS = [Turn("user", "hi"), Turn("assistant", "yes")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "1 s"),
        ("{{ range(99999)|map('string')|map('center', 99999)|list|length }}", "64 MiB"),
        ("{{ '%1000000000d'|format(1) }}", "64 MiB"),
        (DOUBLED.format(start="'x'", sign="~"), "64 MiB"),
        (DOUBLED.format(start="[1]", sign="+"), "64 MiB"),
        ("{{ range(10**9) }}", "100000"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ ' x' * 5000000 }}", "10,000,000"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{{ raise_exception('a\n\x07' * 500) }}", "a"),
    ],
)
def test_a_template_that_escaped_is_stopped(reject, source, word):
    reject(lambda: ChatTemplate(source, "toy.json").render(TURNS, place="f.jsonl:7"), "toy.json", word)
    # A new child process answers the next one.
    assert ChatTemplate(PLAIN, "plain", eos_token="</s>").render(TURNS[1:]) == "### Response:\nyes</s>"


@pytest.mark.parametrize("pause", [0, slow(2.5)])
def test_a_child_that_waited_or_was_killed_answers_the_next_job(monkeypatch, pause):
    """The limits of a job end with it: after 2 s by the clock its alarm would have killed the child."""
    untrusted.run_job("x", "match", patterns=[], names=[])
    child = untrusted._child
    time.sleep(pause)
    if not pause:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        answers = iter([None])  # as if it died just after it was looked at
        monkeypatch.setattr(child, "poll", lambda: next(answers, -9))
    assert untrusted.run_job("x", "match", patterns=["a"], names=["a", "b"]) == [[0], []]
    assert (untrusted._child is child) == bool(pause)


def test_the_child_has_no_environment():
    untrusted.run_job("x", "match", patterns=[], names=[])
    content = Path(f"/proc/{untrusted._child.pid}/environ").read_bytes()
    names = {line.partition(b"=")[0].decode() for line in content.split(b"\0") if line}
    passed = {"SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}
    assert names <= {*passed, "RAYON_NUM_THREADS", "MALLOC_ARENA_MAX", "JAX_PLATFORMS"}


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(kind, parts):
    return {"type": "Sequence", kind: parts}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"normalizer": sequence("normalizers", [replace("a", "a" * 100)] * 5)}, "64 MiB"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 200_000}}, 32),
        ({"decoder": sequence("decoders", [replace("a", "a" * 100)] * 5)}, "MiB"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}}, "index"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "crashes"),
        ({"model": {"continuing_subword_prefix": "##"}}, "slice"),
        ({"model": {"vocab": {"a": "x"}}}, "line 1"),
    ],
    ids=["normalizer", "prepend", "decoder", "panic", "abort", "slice", "json"],
)
def test_a_tokenizer_that_fails_is_stopped(reject, tmp_path, changes, word):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    content = {"version": "1.0", "added_tokens": [], "model": model | changes.pop("model", {})} | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    reject(lambda: open_files(tmp_path).tokenizer, tmp_path / "tokenizer.json", word)


def test_a_piece_of_a_gguf_file_that_is_too_long_to_split_is_rejected(reject, tmp_path):
    pieces = {"tokenizer.ggml.tokens": ["<s>", "a" * 10**6], "tokenizer.ggml.scores": [0.0, 0.0]}
    content = metadata() | {"tokenizer.ggml.model": "llama"} | pieces
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.ones((2, 32), np.float32)}, content)
    reject(lambda: open_files(path).tokenizer, path, 10**6)


def test_memory_of_a_large_conversation_is_enough():
    text = "é😀 words " * (MIB // 8)
    assert text in ChatTemplate(PLAIN, "plain", eos_token="</s>").render([Turn("user", text), TURNS[1]])
