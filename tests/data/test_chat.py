"""Conversations: reading, chat templates, answer masks, packing and multiple choice."""

import csv
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from loraplus_jax.data.chat import encode_chat, find_answers, tokenize_chats
from loraplus_jax.data.chat_template import DATE, PLAIN, ChatTemplate, load_template
from loraplus_jax.data.conversations import Chat, Turn, read_chats
from loraplus_jax.data.multiple_choice import Question, encode_choices, read_questions
from loraplus_jax.data.packing import Sequences, pack, pad, padding_share, plan

BOS, EOS = "<|start|>", "<|end|>"
CHATML = """\
{%- for m in messages %}
    {{- '<|start|>' + m['role'] + '\\n' + m['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"""
INST = """\
{{- bos_token }}
{%- for m in messages if m.role != 'system' %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}
    {%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
MARKED = """\
{% for m in messages %}
{% if m.role == 'assistant' %}
<|start|>assistant
{% generation %}
{{ m.content }}<|end|>{% endgeneration %}

{% else %}
{{ '<|start|>' + m.role + '\\n' + m.content + '<|end|>' }}
{% endif %}
{% endfor %}"""
# Only the last answer is preceded by thoughts, as in Qwen3's.
THINKS = CHATML.replace(
    "m['content']", "('<t></t>' if loop.last and m.role == 'assistant' else '') + m.content"
)


def template(source=CHATML, **fields):
    return ChatTemplate(source, "toy.json", **{"bos_token": BOS, "eos_token": EOS} | fields)


def chat(*texts, system=None, place="f.jsonl:1"):
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Chat(((Turn("system", system),) if system else ()) + tuple(turns), place)


def _specials():
    return [AddedToken(t, special=True, normalized=False) for t in (BOS, EOS)]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE, whose offsets are trimmed as in GPT-2's, which also pads, truncates and adds a token."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    texts = ["the answer is yes, the answers are no\n\nuser assistant INST", "a  b   c"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    result.train_from_iterator(texts, trainer)
    result.add_special_tokens(_specials())
    result.post_processor = processors.ByteLevel(trim_offsets=True)
    result.enable_truncation(5)
    result.enable_padding(length=5)
    return result


def learnt(chats, tokenizer, which, **options):
    """What the loss is on, as text; of one conversation."""
    sequences = tokenize_chats([chats], tokenizer, which, 4096, **options)
    ids = sequences.ids[0][sequences.masks[0] == 1]
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


# reading

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
TURNS = (Turn("user", "Add.\n\n1 2"), Turn("assistant", "3"))


def _json(path, rows):
    lines = "\n".join(json.dumps(r) for r in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, "utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (ALPACA | {"text": "left out"}, None),
        ({"prompt": "Add.\n\n1 2", "completion": 3}, None),
        ({"q": "Add.\n\n1 2", "a": "3"}, {"prompt": "q", "completion": "a"}),
        (
            {"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]},
            None,
        ),
        ({"conversations": [{"from": "human", "value": "Add.\n\n1 2"}, {"from": "gpt", "value": "3"}]}, None),
        ({"x": [{"from": "user", "value": "Add.\n\n1 2"}, {"from": "gpt", "value": "3"}]}, {"messages": "x"}),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_three_shapes_become_turns(tmp_path, row, columns, suffix):
    path = _json(tmp_path / f"a{suffix}", [row, row])
    chats = read_chats(path, columns)
    assert [c.turns for c in chats] == [TURNS] * 2
    assert [c.place for c in chats] == [f"{path}{': item ' if suffix == '.json' else ':'}{n}" for n in (1, 2)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_hold_instructions_or_lists_as_json(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    said = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    for rows in ([["instruction", "input", "output"], ["Add.", "1 2", "3"]], [["messages"], [said]]):
        with path.open("w", newline="") as file:
            csv.writer(file, "excel-tab" if suffix == ".tsv" else "excel").writerows(rows)
        assert read_chats(path)[0].turns in (TURNS, (Turn("user", "a"), Turn("assistant", "b")))
        assert read_chats(path)[0].place == f"{path}:2"


def test_what_may_be_missing_and_what_goes_first(tmp_path):
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": None, "output": "b", "system": "Be kind."},
        {"instruction": "a", "input": " \n", "output": " b", "system": ""},
    ]
    turns = [c.turns for c in read_chats(_json(tmp_path / "a.jsonl", rows))]
    assert turns[0] == (Turn("user", "a"), Turn("assistant", "b"))
    assert turns[1] == (Turn("system", "Be kind."), *turns[0])
    assert turns[2] == (Turn("user", "a"), Turn("assistant", " b"))
    both = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "prompt": "p",
    }
    assert read_chats(_json(tmp_path / "a.jsonl", [both]))[0].turns[0].text == "x"


def _said(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


U, A, S = ("user", "a"), ("assistant", "b"), ("system", "c")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (_said(("usr", "a"), A), "turn 1 has the unknown role \"usr\"; did you mean 'user'?"),
        (_said((3, "a"), A), "turn 1 has the unknown role 3; known: assistant, gpt, human, system, user"),
        (_said(U, ("assistant", " \n")), "turn 2: content is empty"),
        (_said(U, ("assistant", None)), "turn 2: content must be a string, got null"),
        (_said(U, ("assistant", "\ud800")), "turn 2: content holds half a surrogate pair"),
        (_said(U), "no turn of the assistant"),
        (_said(A, U, A), "the assistant speaks first"),
        (_said(U, A, U), "the last turn is the user's"),
        (_said(U, S, A), "turn 2 is the system's, which can only be the first"),
        ({"messages": []}, "column 'messages' must hold a list, not empty, got []"),
        ({"messages": "hi"}, "column 'messages' must hold a list, not empty, got \"hi\""),
        ({"messages": ["hi"]}, 'turn 1 must be {"role": ..., "content": ...} or {"from"'),
        ({"messages": [{"role": "user"}]}, "turn 1 must be"),
        ({"mesages": []}, "no column 'messages'; did you mean 'mesages'?"),
        (["x"], "each line must hold a JSON object"),
    ],
)
def test_every_problem_is_named_with_its_place(tmp_path, row, named):
    rows = [_said(U, A), row, _said(U, A)]
    with pytest.raises(ValueError, match=re.escape(f"a.jsonl:2: {named}")):
        read_chats(_json(tmp_path / "a.jsonl", rows))
    with pytest.raises(
        ValueError, match=re.escape(f"a.json: item 2: {named.replace('line must hold', 'item must be')}")
    ):
        read_chats(_json(tmp_path / "a.json", rows))


def test_problems_are_reported_together(tmp_path):
    rows = [ALPACA | {"output": ""}, ALPACA, ALPACA | {"instruction": [1]}, *[{"input": "a"}] * 24]
    with pytest.raises(
        ValueError, match=r"item 1: column 'output' is empty \(the first of 50 problems\)"
    ) as caught:
        read_chats(_json(tmp_path / "a.json", rows))
    lines = str(caught.value).splitlines()
    assert "item 3: column 'instruction' must hold a string or a number, got [1]" in lines[2]
    assert "item 4: no column 'instruction'" in lines[3]
    assert lines[-1].strip() == "... and 30 more"


@pytest.mark.parametrize(
    ("name", "content", "columns", "named"),
    [
        ("a.json", '{"a": 1}', None, "a.json: must hold a JSON list of objects"),
        ("a.json", '[\n{"a": 1},\n', None, "a.json:3: invalid JSON"),
        ("a.json", "[" * 100_000, None, "a.json:1: invalid JSON"),
        ("a.json", b"[\n\xff]", None, "a.json:2: byte 0xff is not UTF-8"),
        ("a.json", "[]", None, "a.json: the list is empty"),
        ("a.json", "", None, "a.json: the file is empty"),
        ("a.csv", "prompt,completion\n", None, "a.csv: no rows below the header"),
        ("a.jsonl", '{"words": 1}', None, "a.jsonl: no conversations in words: a file needs messages (or"),
        ("a.jsonl", '{"words": 1}', {"prompt": "text"}, "columns must name messages (or conversations), or"),
        ("a.jsonl", "{}", {"messages": "a", "prompt": "text"}, "got messages, prompt"),
        ("a.txt", "", None, "cannot read .txt: use .csv, .tsv, .jsonl, .json"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, columns, named):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(named)):
        read_chats(tmp_path / name, columns)


# templates


def test_a_template_sees_what_transformers_gives_it():
    source = """\
{% if tools is none and documents is none %}
    {{ bos_token }}
{%- endif %}
    {% for m in messages %}
  {% if m.role == 'system' %}{% continue %}{% endif %}
{{ m.content | tojson }}{{ strftime_now('%d %b %Y') }}{{ loop.length }}{{ loop.last }}
    {% endfor %}"""
    # What jinja2 3.1 gives with trim_blocks and lstrip_blocks.
    expected = f'    {BOS}"<\u00e9>"26 Jul 20242False\n"b"26 Jul 20242True\n'
    turns = [Turn("user", "<\u00e9>"), Turn("assistant", "b")]
    assert template(source).render(turns) == expected
    assert DATE.year == 2024


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{{ messages[0].missing.more }}", "has no attribute 'missing'"),
        ("{{ messages[9].role }}", "has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        (
            "{% for x in range(9999) %}{% for y in range(9999) %}{% endfor %}{% endfor %}",
            "more than 1,000,000 loop",
        ),
        (
            "{% set r = range(9999) %}{% for x in r %}{% for y in r %}{% endfor %}{% endfor %}",
            "more than 1,000,000",
        ),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
            "more than 1,000",
        ),
        ("{{ 'x' * 10**9 }}", "** makes too large a value"),
        ("{{ 'x' * 999999999 }}", "* makes too large a value"),
        ("{% for x in range(300) %}{{ 'x' * 99999 }}{% endfor %}", "more than 16,777,216 characters"),
        ("{% for x in 3 %}{% endfor %}", "not iterable"),
    ],
)
def test_a_template_that_fails_is_named_with_the_row(source, named):
    with pytest.raises(ValueError, match=r"f\.jsonl:7: the chat template of toy\.json fails: ") as caught:
        encode_chat([chat("a", "b", place="f.jsonl:7")], Tokenizer(models.BPE()), template(source), 8)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("a\n{% if %}", "in line 2: Expected an expression"),
        ("{% generation %}", "in line 1: Unexpected end"),
        ("{{ x | nope }}", "No filter named 'nope'"),
        (
            "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
            "recursive loops are not allowed",
        ),
        ("{{ " + "(" * 20_000, "is not valid"),
    ],
)
def test_a_template_that_is_none(source, named):
    with pytest.raises(ValueError, match=r"the chat template of toy\.json is not valid") as caught:
        template(source)
    assert named in str(caught.value)


def test_a_template_is_chosen_by_name(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOS}}))
    with pytest.raises(ValueError, match=r"has no chat template: choose plain .* with data\.template"):
        load_template("model", tmp_path)
    plain = load_template("plain", tmp_path)
    text = plain.render(chat("Add.", "3", "And?", "4", system="Be kind.").turns)
    blocks = ["Be kind.", "### Instruction:\nAdd.", f"### Response:\n3{EOS}", "### Instruction:\nAnd?"]
    assert text == "\n\n".join([*blocks, f"### Response:\n4{EOS}"])
    (tmp_path / "own.jinja").write_text("\ufeff{{ eos_token }}!", "utf-8")
    assert load_template(str(tmp_path / "own.jinja"), tmp_path).render([]) == f"{EOS}!"
    with pytest.raises(ValueError, match=r"cannot read the chat template 'pain' \(it is model, plain or"):
        load_template("pain", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ messages[0].content }}"})
    )
    assert load_template("model", tmp_path).render([Turn("user", "hi")]) == "hi"
    with pytest.raises(ValueError, match="the template plain ends answers with the eos_token"):
        load_template("plain", tmp_path)


# answers

ANSWERS = [
    "yes",
    " the answers",
    "  two spaces ",
    "\U0001f680 go",
    "go \U0001f468\u200d\U0001f680",
    "\u00fc\u4e16\u754c",
    "a\n\nb",
]


@pytest.mark.parametrize("source", [CHATML, PLAIN, MARKED], ids=["chatml", "plain", "marked"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_loss_is_on_the_answer_and_its_end(tokenizer, source, answer):
    one = chat("the \U0001f680 user", answer)
    assert learnt(one, tokenizer, template(source)) == answer + EOS


@pytest.mark.parametrize("source", [CHATML, PLAIN, MARKED], ids=["chatml", "plain", "marked"])
def test_of_several_answers_all_or_the_last(tokenizer, source):
    many = chat("a", "no", "b", "no", "no", " yes", system="no")
    assert learnt(many, tokenizer, template(source)) == f"no{EOS}no{EOS} yes{EOS}"
    assert learnt(many, tokenizer, template(source), answers="last") == f" yes{EOS}"
    with pytest.raises(ValueError, match="answers must be all or last, got 'first'"):
        learnt(many, tokenizer, template(source), answers="first")


def test_what_the_template_writes_before_the_end_belongs_to_the_answer(tokenizer):
    assert learnt(chat("a", " b ", "c", "d"), tokenizer, template(INST)) == f" b {EOS} d {EOS}"
    assert learnt(chat("a", "b"), tokenizer, template(THINKS)) == f"<t></t>b{EOS}"


def test_a_text_that_repeats_the_prompt_is_found_in_its_own_turn(tokenizer):
    one = chat("yes", "yes", "yes", "yes")
    _, spans = find_answers(template(), one)
    whole = template().render(one.turns)
    assert [whole[s.start : s.text_end] for s in spans] == ["yes", "yes"]
    assert [s.start for s in spans] == [m.end() for m in re.finditer("assistant\n", whole)]


_TEXT = st.text(
    st.one_of(st.sampled_from(" the\n"), st.characters(exclude_categories=["Cs"])), min_size=1, max_size=12
).filter(lambda text: text.strip() and not {"\ufdd0", "\ufdd1"} & set(text))


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=3), st.sampled_from([CHATML, MARKED]))
def test_tokens_and_answers_of_any_text(tokenizer, pairs, source):
    """Answers behind a special token, so that no token reaches from the prompt into one."""
    which = template(source.replace("'\\n' + m['content']", "'<|start|>' + m['content']"))
    which = template(re.sub(r"assistant(\n|\\n)", "assistant<|start|>", which.source))
    one = chat(*(text for pair in pairs for text in pair))
    sequences = tokenize_chats([one], tokenizer, which, 4096)
    whole = which.render(one.turns)
    assert tokenizer.decode(sequences.ids[0].tolist(), skip_special_tokens=False) == whole
    assert learnt(one, tokenizer, which) == "".join(answer + EOS for _, answer in pairs)


def test_a_token_that_reaches_into_an_answer_is_the_answers(tokenizer):
    which = template(CHATML.replace("assistant\\n", "assistant ").replace("'\\n' + m", "' ' + m"))
    one = chat("a", "  b")
    whole = tokenize_chats([one], tokenizer, which, 64)
    assert tokenizer.token_to_id("\u0120\u0120") in whole.ids[0]
    assert learnt(one, tokenizer, which) == f"   b{EOS}"


def test_the_first_token_is_never_to_be_predicted(tokenizer):
    bare = template("{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}")
    sequences = tokenize_chats([chat("a", "no no")], tokenizer, bare, 64)
    assert sequences.masks[0].tolist() == [0, 1, 1]


def test_sentencepiece_like_tokenizers(tokenizer):
    vocabulary = [
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        *"abcdenostywuri[]/INT,",
        "\u2581a",
        "es",
        "yes",
        "\u2581yes",
    ]
    merges = [("\u2581", "a"), ("e", "s"), ("y", "es"), ("\u2581", "yes")]
    tokens = {t: i for i, t in enumerate(vocabulary)}
    result = Tokenizer(models.BPE(tokens, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    result.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    result.decoder = decoders.Sequence(steps)
    result.add_special_tokens(_specials())
    answer = "yes \U0001f680\u00fc yes"
    assert (
        learnt(chat("\U0001f680 a", answer, "s", "yes"), result, template(INST))
        == f" {answer} {EOS} yes {EOS}"
    )


def test_arrays_are_padded_cut_and_counted(tokenizer):
    chats = [chat("a", "b"), chat("a", "b" * 40)]
    short = len(tokenize_chats(chats[:1], tokenizer, template(), 99).ids[0])
    arrays, truncated = encode_chat(chats, tokenizer, template(), short + 3)
    assert truncated == 1
    assert {k: (v.shape, v.dtype.name) for k, v in arrays.items()} == {
        "input_ids": ((2, short + 3), "int32"),
        "segment_ids": ((2, short + 3), "int32"),
        "loss_mask": ((2, short + 3), "float32"),
    }
    assert arrays["segment_ids"].tolist() == [[1] * short + [0] * 3, [1] * (short + 3)]
    assert arrays["loss_mask"][0].tolist() == [0] * (short - 3) + [1, 1] + [0] * 4
    assert arrays["loss_mask"][1].tolist() == [0] * (short - 3) + [1] * 6
    assert arrays["input_ids"][0, short:].tolist() == [0] * 3
    assert (tokenizer.truncation["max_length"], tokenizer.padding["length"]) == (5, 5)  # as they were
    assert encode_chat([], tokenizer, template(), 8)[0]["input_ids"].shape == (0, 8)


def test_a_conversation_without_an_answer_token_is_refused(tokenizer):
    chats = [chat("a", "b", place=f"f:{i}") for i in range(3)] + [chat("a" * 50, "b", place="f:9")]
    length = int(tokenize_chats(chats[3:], tokenizer, template(), 999).masks[0].argmax())
    assert tokenize_chats(chats, tokenizer, template(), length + 1).truncated == 1
    named = (
        rf"max_length {length} leaves no answer token in 1 of 4 .* up to {length} tokens: raise it or remove"
    )
    with pytest.raises(ValueError, match=named) as caught:
        tokenize_chats(chats, tokenizer, template(), length)
    assert str(caught.value).splitlines()[1].strip() == f"f:9: {length} tokens before the answer"
    with pytest.raises(ValueError, match="max_length must be"):
        tokenize_chats(chats, tokenizer, template(), 1)


CONTENT = "m['content']"
NO_END = "' + ('' if loop.index == 2 else '<|end|>') + '"
# The second turn is rendered otherwise when it is the last, so where it ends is not known.
BOS_FIRST = (
    "{% for m in messages %}{{ bos_token + m.role + '\\n' + m.content }}"
    "{{ '' if loop.index == 2 and not loop.last else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)
OTHER = "(m.content | upper if loop.index == 2 else m.content)"


@pytest.mark.parametrize(
    ("source", "texts", "named"),
    [
        (CHATML.replace(CONTENT, "m.content ~ messages | length"), "ab", "cannot tell answers from prompts"),
        (
            CHATML.replace(CONTENT, "m.content | upper"),
            "ab",
            "does not write the answer in turn 2 as it stands",
        ),
        (CHATML.replace("{{ '<|start|>assistant\\n' }}", ""), "ab", "must honour add_generation_prompt"),
        (CHATML.replace("<|end|>", ""), "ab", "writes no special token after an answer"),
        (CHATML.replace("<|end|>", NO_END), "abcd", "writes no special token after an answer"),
        (BOS_FIRST, "abcd", "writes no special token after an answer"),
        (CHATML.replace(CONTENT, OTHER), "abcb", "does not write the answer in turn 2 as it stands"),
        (CHATML.replace("<|end|>", "<|stop|>"), "ab", "or the tokenizer does not know the token"),
        (INST, "a", "fails: roles must alternate"),
        (CHATML + "{% generation %}{% endgeneration %}", "ab", "generation blocks of toy.json write nothing"),
        (CHATML, ["a\ufdd0", "b"], "U+FDD0 or U+FDD1"),
    ],
)
def test_templates_that_hide_where_answers_are(tokenizer, source, texts, named):
    one = chat(*texts)
    if len(texts) == 1:
        one = Chat((Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")), "f.jsonl:1")
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        tokenize_chats([one], tokenizer, template(source), 99)
    assert str(caught.value).startswith("f.jsonl:1: ")


def test_the_end_of_a_turn_is_not_looked_for_in_the_next(tokenizer):
    silent = template(CHATML.replace("<|end|>", NO_END), bos_token="")
    with pytest.raises(ValueError, match="writes no special token after an answer"):
        tokenize_chats([chat(*"abcd")], tokenizer, silent, 99)


def test_a_template_that_drops_earlier_thoughts_needs_marks_or_the_last_answer(tokenizer):
    """The thoughts before the last answer are not rendered in a prefix, which ends in the generation prompt."""
    many = chat("a", "b", "c", "d")
    assert learnt(many, tokenizer, template(THINKS)) == f"b{EOS}<t></t>d{EOS}"


# packing


def _sequences(lengths):
    """Tokens that all differ."""
    ends = np.cumsum(lengths)
    ids = tuple(np.arange(e - n, e, dtype=np.int32) + 1 for e, n in zip(ends, lengths, strict=True))
    return Sequences(ids, tuple((i % 3 == 0).astype(np.float32) for i in ids))


def _unpacked(arrays):
    found = []
    for ids, segments, mask in zip(
        *(arrays[k] for k in ("input_ids", "segment_ids", "loss_mask")), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            assert (np.diff(places) == 1).all()
            found.append((ids[places].tolist(), mask[places].tolist()))
        assert not ids[segments == 0].any()
        assert not mask[segments == 0].any()
    return sorted(found)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 16), max_size=40))
def test_packing_moves_no_token_between_sequences(lengths):
    sequences = _sequences(lengths)
    packed, padded = pack(sequences, 16), pad(sequences, 16)
    assert _unpacked(packed) == _unpacked(padded)
    assert len(_unpacked(padded)) == len(lengths)
    rows = len(packed["input_ids"])
    assert rows <= len(lengths)
    assert all((np.diff(np.nonzero(s)[0]) == 1).all() for s in packed["segment_ids"])
    filled = sorted((packed["segment_ids"] > 0).sum(1))
    assert rows < 2 or filled[0] + filled[1] > 16  # no two rows could be one
    again = pack(sequences, 16)
    assert all((again[k] == packed[k]).all() for k in packed)


def test_packing_by_hand():
    packed = pack(_sequences([3, 5, 2, 4, 1]), 6)
    assert packed["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 15], [9, 10, 11, 12, 13, 14]]
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 2], [1, 1, 2, 2, 2, 2]]
    assert packed["loss_mask"].tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]]
    assert padding_share(packed) == 3 / 18
    assert padding_share(pad(_sequences([3, 5, 2, 4, 1]), 6)) == 15 / 30
    assert padding_share(pack(_sequences([]), 6)) == 0


def test_a_hundred_thousand_sequences_are_packed_almost_without_padding():
    lengths = np.random.default_rng(0).integers(1, 512, 100_000).tolist()
    rows = plan(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(100_000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 512
    assert len(rows) < 1.01 * sum(lengths) / 512


@pytest.mark.parametrize("lengths", [[3, 0], [3, 7], [0]])
def test_sequences_that_do_not_fit_are_refused(lengths):
    for way in (pack, pad):
        with pytest.raises(ValueError, match=r"sequences must have 1 to 6 tokens, got [07] in number"):
            way(_sequences(lengths), 6)


# multiple choice

COMMONSENSE = {
    "instruction": "Is it so?\n\nanswer1: a answer2: b\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


@pytest.mark.parametrize(
    ("answer", "index"), [(1, 1), ("yes", 1), (" no", 0), ("B", 1), ("c", 2), ("2", 2), ("7", 3)]
)
def test_the_right_choice_by_text_letter_or_index(tmp_path, answer, index):
    row = {"question": "So?", "choices": ["no", "yes", "x y", "7"], "answer": answer}
    path = _json(tmp_path / "a.json", [row])
    assert read_questions(path) == [Question("So?", ("no", "yes", "x y", "7"), index, f"{path}: item 1")]
    renamed = {"q": row["question"], "c": json.dumps(row["choices"]), "a": answer}
    named = {"prompt": "q", "choices": "c", "answer": "a"}
    assert read_questions(_json(tmp_path / "a.json", [renamed]), named) == read_questions(_json(path, [row]))


@pytest.mark.parametrize(
    "words", ["answer1/answer2/answer3", "true/false", "ending1/ending2/ending3/ending4"]
)
def test_commonsense_rows(tmp_path, words):
    names = words.split("/")
    row = {"instruction": f"So?\n\nAnswer format: {words}", "output": f"the correct answer is {names[1]}"}
    (question,) = read_questions(_json(tmp_path / "a.json", [row | {"input": "", "answer": names[1]}]))
    assert question.prompt == row["instruction"]
    assert question.choices == tuple(f"the correct answer is {n}" for n in names)
    assert question.answer == 1
    (question,) = read_questions(_json(tmp_path / "a.json", [row | {"input": "more"}]))
    assert question.prompt.endswith("\n\nmore")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (
            {"answer": 3},
            "column 'answer' must hold one of the choices, a letter from A to C or an index from 0 to 2",
        ),
        ({"answer": True}, "got True"),
        ({"answer": "d"}, "got 'd'"),
        ({"answer": None}, "got None"),
        ({"choices": ["a"]}, "two choices or more"),
        ({"choices": ["a", "a"]}, "all different"),
        ({"choices": ["a", ""]}, "texts that are not empty"),
        ({"choices": ["a", 3]}, "texts that are not empty"),
        ({"choices": "a, b"}, "column 'choices' must hold a list"),
        ({"prompt": " "}, "column 'prompt' is empty"),
    ],
)
def test_questions_that_are_refused(tmp_path, row, named):
    good = {"prompt": "So?", "choices": ["x", "y", "z"], "answer": 0}
    with pytest.raises(ValueError, match=re.escape("a.jsonl:2: ") + ".*" + re.escape(named)):
        read_questions(_json(tmp_path / "a.jsonl", [good, good | row]))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"instruction": "So?"}, "the instruction must end in 'Answer format: '"),
        ({"instruction": "Answer format: yes"}, "the instruction must end in"),
        (
            {"output": "the correct answer is answer4"},
            "the output must be one of 'the correct answer is answer1'",
        ),
        ({"output": "answer2"}, "got 'answer2'"),
    ],
)
def test_commonsense_rows_that_are_refused(tmp_path, row, named):
    with pytest.raises(ValueError, match="item 2: .*" + re.escape(named)):
        read_questions(_json(tmp_path / "a.json", [COMMONSENSE, COMMONSENSE | row]))
    with pytest.raises(ValueError, match="no questions in text: a file needs prompt"):
        read_questions(_json(tmp_path / "a.json", [{"text": "a"}]))
    with pytest.raises(ValueError, match="columns must name prompt"):
        read_questions(_json(tmp_path / "a.json", [COMMONSENSE]), {"prompt": "a"})


@pytest.mark.parametrize("source", [CHATML, PLAIN, INST, MARKED], ids=["chatml", "plain", "inst", "marked"])
def test_only_the_choice_is_scored(tokenizer, source):
    questions = [
        Question("the \u4e16 user?", ("yes", "the answers are no", "\U0001f680"), 1),
        Question("b", ("no", "b"), 0),
    ]
    arrays = encode_choices(questions, tokenizer, template(source), 64)
    assert arrays["input_ids"].shape == arrays["segment_ids"].shape == arrays["loss_mask"].shape == (2, 3, 64)
    assert (arrays["answer"].tolist(), arrays["n_choices"].tolist()) == ([1, 0], [3, 2])
    assert arrays["byte_lengths"].tolist() == [[3, 18, 4], [2, 1, 1]]
    for n, question in enumerate(questions):
        for c, choice in enumerate(question.choices):
            ids, mask = arrays["input_ids"][n, c], arrays["loss_mask"][n, c]
            assert tokenizer.decode(ids[mask == 1].tolist()).strip() == choice
            assert mask[(arrays["segment_ids"][n, c] == 1).sum() - 1] == 1  # nothing stands behind it
    assert not arrays["segment_ids"][1, 2].any()
    assert not arrays["loss_mask"][1, 2].any()


def test_spaces_at_the_end_of_a_choice_are_scored(tokenizer):
    """Trimmed offsets would leave them out."""
    arrays = encode_choices([Question("a", ("  yes  ", "no"), 0)], tokenizer, template(), 64)
    ids = arrays["input_ids"][0, 0][arrays["loss_mask"][0, 0] == 1]
    assert tokenizer.decode(ids.tolist()) == "  yes  "


def test_a_question_that_is_too_long_is_refused(tokenizer):
    question = Question("a", ("b", "b" * 30), 0, "f:3")
    need = int(encode_choices([question], tokenizer, template(), 99)["segment_ids"].sum(-1).max())
    encode_choices([question], tokenizer, template(), need)
    with pytest.raises(ValueError, match=rf"f:3: {need} tokens with choice 2, above max_length {need - 1}"):
        encode_choices([question], tokenizer, template(), need - 1)
    assert encode_choices([], tokenizer, template(), 9)["input_ids"].shape == (0, 0, 9)


def test_texts_are_learned_whole_and_as_they_stand(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one two three", "article": "x"}\n{"text": "four"}\n')
    chats = read_chats(path)
    assert [chat.turns for chat in chats] == [(Turn("text", "one two three"),), (Turn("text", "four"),)]
    template = ChatTemplate("{{ raise_exception('not used') }}", "none")
    whole, [span] = find_answers(template, chats[0])
    assert (whole, span.start, span.end) == ("one two three", 0, 13)


def test_an_answer_that_stands_in_the_template_as_well_is_found_where_it_was_written():
    said = "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}|"
    source = "{% for m in messages %}{{ m.role }}: " + said + "{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    chat = Chat((Turn("user", "What do you do?"), Turn("assistant", "think")))
    whole, [span] = find_answers(ChatTemplate(source, "t"), chat)
    assert (span.text, span.text_end) == (len(whole) - 6, len(whole) - 1)
