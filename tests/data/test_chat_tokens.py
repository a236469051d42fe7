"""Which tokens of a conversation the loss is on."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from loraplus_jax.data import chat_template
from loraplus_jax.data.chat_template import PLAIN, ChatTemplate
from loraplus_jax.data.chat_tokens import find_answers, leading_ids, tokenize_chats
from loraplus_jax.data.conversations import Chat, Turn, read_chats

from ..messages import mentions
from ..refusals import refusals
from .chats import (
    BOS,
    CHATML,
    EOS,
    INST,
    MARKED,
    THINKS,
    TOOL_TALK,
    TOOLS,
    chat,
    learnt,
    specials,
    template,
    write_json,
)

ANSWERS = ["yes", " the answers", "  two spaces ", "a\n\nb"]
ANSWERS += ["\U0001f680 go", "go \U0001f468\u200d\U0001f680", "\u00fc\u4e16\u754c"]


templates = pytest.mark.parametrize("source", [CHATML, PLAIN, MARKED], ids=["chatml", "plain", "marked"])


@templates
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_loss_is_on_the_answer_and_its_end(tokenizer, source, answer):
    one = chat("the \U0001f680 user", answer)
    assert learnt(one, tokenizer, template(source)) == answer + EOS


@templates
def test_of_several_answers_all_or_the_last(tokenizer, source):
    many = chat("a", "no", "b", "no", "no", " yes", system="no")
    assert learnt(many, tokenizer, template(source)) == f"no{EOS}no{EOS} yes{EOS}"
    assert learnt(many, tokenizer, template(source), answers="last") == f" yes{EOS}"


def test_a_text_that_repeats_the_prompt_is_found_in_its_own_turn(tokenizer):
    one = chat("yes", "yes", "yes", "yes")
    ((_, spans),) = find_answers(template(), [one])
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
    columns, _ = tokenize_chats([one], tokenizer, which, 4096)
    whole = which.render(one.turns)
    assert tokenizer.decode(columns["input_ids"][0].tolist(), skip_special_tokens=False) == whole
    assert learnt(one, tokenizer, which) == "".join(answer + EOS for _, answer in pairs)


def test_a_token_that_reaches_into_an_answer_is_the_answers(tokenizer):
    which = template(CHATML.replace("assistant\\n", "assistant ").replace("'\\n' + m", "' ' + m"))
    one = chat("a", "  b")
    whole, _ = tokenize_chats([one], tokenizer, which, 64)
    assert tokenizer.token_to_id("\u0120\u0120") in whole["input_ids"][0]
    assert learnt(one, tokenizer, which) == f"   b{EOS}"


def test_the_first_token_is_never_to_be_predicted(tokenizer):
    bare = template("{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}")
    columns, _ = tokenize_chats([chat("a", "no no")], tokenizer, bare, 64)
    assert columns["loss_mask"][0].tolist() == [0, 1, 1]


def test_sentencepiece_like_tokenizers(tokenizer):
    vocabulary = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdenostywuri[]/INT,"]
    vocabulary += ["\u2581a", "es", "yes", "\u2581yes"]
    merges = [("\u2581", "a"), ("e", "s"), ("y", "es"), ("\u2581", "yes")]
    tokens = {t: i for i, t in enumerate(vocabulary)}
    result = Tokenizer(models.BPE(tokens, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    result.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    result.decoder = decoders.Sequence(steps)
    result.add_special_tokens(specials())
    answer = "yes \U0001f680\u00fc yes"
    many = chat("\U0001f680 a", answer, "s", "yes")
    assert learnt(many, result, template(INST)) == f" {answer} {EOS} yes {EOS}"


def test_tokens_are_cut_and_counted(tokenizer):
    chats = [chat("a", "b"), chat("a", "b" * 40)]
    short = len(tokenize_chats(chats[:1], tokenizer, template(), 99)[0]["input_ids"][0])
    columns, truncated = tokenize_chats(chats, tokenizer, template(), short + 3)
    assert truncated == 1
    assert [*map(len, columns["input_ids"])] == [short, short + 3]
    assert {column[0].dtype.name for column in columns.values()} == {"int32", "float32"}
    masks = [mask.tolist() for mask in columns["loss_mask"]]
    assert masks == [[0] * (short - 3) + [1, 1, 0], [0] * (short - 3) + [1] * 6]
    assert tokenize_chats([], tokenizer, template(), 8)[0]["input_ids"].shape == (0,)


def test_a_conversation_without_an_answer_token_is_rejected(tokenizer):
    chats = [chat("a", "b", place=f"f:{i}") for i in range(3)] + [chat("a" * 50, "b", place="f:9")]
    length = int(tokenize_chats(chats[3:], tokenizer, template(), 999)[0]["loss_mask"][0].argmax())
    assert tokenize_chats(chats, tokenizer, template(), length + 1)[1] == 1
    with pytest.raises(ValueError, match=mentions("f:9", f"{length} tokens", f"max_length {length}")):
        tokenize_chats(chats, tokenizer, template(), length)


@templates
def test_turns_with_weight_0_are_not_trained_on(tokenizer, source):
    many = chat("a", "no", "b", "yes", "c", "the")
    turns = [dataclasses.replace(turn, trained=turn.text == "yes") for turn in many.turns]
    weighted = dataclasses.replace(many, turns=tuple(turns))
    assert learnt(weighted, tokenizer, template(source)) == f"yes{EOS}"
    assert learnt(weighted, tokenizer, template(source), answers="last") == f"yes{EOS}"


SAID = ['\nadd {"a": 1, "b": "two"}<|end|>', 'See.\nadd {}\nsub {"c": [4]}<|end|>', "It is 3.<|end|>"]


@pytest.fixture
def tool_talk(tmp_path):
    return read_chats(write_json(tmp_path / "f.jsonl", [TOOL_TALK]))[0]


# The second writes a special token before a call; the third other text after one, which ends in another token.
@pytest.mark.parametrize(
    ("source", "said"),
    [
        (TOOLS, SAID),
        (TOOLS.replace("'\\n' + call", "'<|start|>' + call"), [s.replace("\n", "<|start|>") for s in SAID]),
        (
            TOOLS.replace("(call.function.arguments | tojson)", "(call.function.arguments | tojson) + ' 3'"),
            [s.replace("}<|", "} 3<|").replace("}\n", "} 3\n") for s in SAID],
        ),
    ],
)
def test_the_loss_is_on_tool_calls_and_not_on_results(tokenizer, tool_talk, source, said):
    assert learnt(tool_talk, tokenizer, template(source)) == "".join(said)
    assert learnt(tool_talk, tokenizer, template(source), answers="last") == said[-1]
    rendered = template(source).render(tool_talk.turns, tools=tool_talk.tools)
    assert rendered.startswith('<|start|>tools\n[{"type": "function"')
    assert "<|start|>tool\n3<|end|>" in rendered


def test_the_header_of_a_turn_that_only_calls_is_no_answer(tokenizer, tool_talk):
    one = dataclasses.replace(tool_talk, turns=tool_talk.turns[:2])
    assert learnt(one, tokenizer, template(TOOLS)) == SAID[0]
    without = template(TOOLS.replace("{{ '<|start|>assistant\\n' }}", ""))
    with pytest.raises(ValueError, match=mentions("special tokens", "add_generation_prompt")):
        tokenize_chats([one], tokenizer, without, 999)


def test_long_tools_and_calls_may_be_rendered(tool_talk):
    long = "x" * 100_000
    call = tool_talk.turns[1]
    turns = (tool_talk.turns[0], dataclasses.replace(call, extra=call.extra.replace("two", long)))
    assert template(TOOLS).render(turns, tools=f'["{long}"]').count(long) == 2


CALLS = TOOLS[TOOLS.index("    {%- for call") : TOOLS.index("    {{- '<|end|>")]
ONLY_USER = TOOLS.replace("m.role +", "('user' if m.role == 'user' else 'assistant') +")
PROMPT = "{{ '<|start|>assistant\\n' }}"
CONTENT = "m['content']"
NO_END = "' + ('' if loop.index == 2 else '<|end|>') + '"
OTHER = "(m.content | upper if loop.index == 2 else m.content)"
NUMBERED = CHATML.replace(CONTENT, "m.content ~ messages | length")
ONE_MARK = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
# The second turn is rendered otherwise when it is the last, so where it ends is not known.
BOS_FIRST = (
    "{% for m in messages %}{{ bos_token + m.role + '\\n' + m.content }}"
    "{{ '' if loop.index == 2 and not loop.last else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)
WEIGHTED = (*chat("a", "b", "c").turns, Turn("assistant", "d", trained=False))
TWO_USERS = (Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c"))
AT = ("f.jsonl:1", "toy.json")


def of_tools(source, **fields):
    return lambda tokenizer, tool_talk: learnt(tool_talk, tokenizer, template(source, **fields))


def of_texts(source, *texts, **options):
    return lambda tokenizer: learnt(chat(*texts), tokenizer, template(source), **options)


def of_turns(source, *turns):
    return lambda tokenizer: learnt(Chat(turns, "f.jsonl:1"), tokenizer, template(source))


test_templates_that_ignore_tools_or_hide_where_answers_are = refusals(
    (of_tools(TOOLS.replace("if tools", "if false")), *AT, "tools", "data.template"),
    (of_tools(TOOLS.replace(CALLS, "")), *AT, "tool calls", "turn 2"),
    (of_tools(TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")), *AT, "tool calls", "turn 4"),
    (of_tools(TOOLS.replace("in messages", "in messages if m.role != 'tool'")), *AT, "role tool", "turn 3"),
    (of_tools(ONLY_USER), *AT, "role tool", "turn 3"),
    (of_tools(TOOLS.replace(PROMPT, "")), *AT, "special tokens", "add_generation_prompt"),
    (of_tools(PLAIN), *AT, "tools"),
    (of_tools(PLAIN, origin="my{1}.jinja"), "my{1}.jinja", "tools"),
    (of_texts(NUMBERED, *"ab"), *AT, "turn 2", "{% generation %}"),
    (of_texts(CHATML.replace(CONTENT, "m.content | upper"), *"ab"), *AT, "answer", "turn 2"),
    (of_texts(CHATML.replace(PROMPT, ""), *"ab"), *AT, "add_generation_prompt"),
    (of_texts(CHATML.replace("<|end|>", ""), *"ab"), *AT, "special token", "stop"),
    (of_texts(CHATML.replace("<|end|>", NO_END), *"abcd"), *AT, "special token", "stop"),
    (of_texts(BOS_FIRST, *"abcd"), *AT, "special token", "stop"),
    (of_texts(CHATML.replace(CONTENT, OTHER), *"abcb"), *AT, "answer", "turn 2"),
    (of_texts(CHATML.replace("<|end|>", "<|stop|>"), *"ab"), *AT, "special token", "tokenizer"),
    (of_turns(INST, *TWO_USERS), *AT, "roles must alternate"),
    (of_texts(CHATML + "{% generation %}{% endgeneration %}", *"ab"), *AT, "generation"),
    (of_texts(CHATML, "a\ufdd0", "b"), "f.jsonl:1", "U+FDD0", "U+FDD1"),
    (of_turns(ONE_MARK, *WEIGHTED), *AT, "weights", 1, 2),
)


def test_the_end_of_a_turn_is_not_searched_in_the_next(tokenizer):
    silent = template(CHATML.replace("<|end|>", NO_END), bos_token="")
    with pytest.raises(ValueError, match=mentions("toy.json", "special token", "stop")):
        learnt(chat(*"abcd"), tokenizer, silent)


QWEN = """\
{%- for m in messages %}
    {%- set thought, said = '', m.content %}
    {%- if '</think>' in said %}
        {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- set thought = '<think>\\n' + thought + '\\n</think>\\n\\n' if m.role == 'assistant' and loop.last else '' %}
    {{- '<|start|>' + m.role + '\\n' + thought + said + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
"""The part of Qwen 3's template that is about thoughts."""
SILENT = "{%- set enable_thinking = false %}\n" + QWEN
EMPTY, THOUGHT = "<think>\n\n</think>\n\n", "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize(
    ("which", "texts", "answers", "learned"),
    [
        (template(PLAIN, bos_token=EOS), ("a", "no"), "all", f"no{EOS}"),  # one token for beginning and end
        (template(INST), ("a", " b ", "c", "d"), "all", f" b {EOS} d {EOS}"),  # a space before the end
        (template(THINKS), "ab", "all", f"<t></t>b{EOS}"),
        # The thoughts before the last answer are not rendered in a prefix, which ends in the generation prompt.
        (template(THINKS), "abcd", "all", f"b{EOS}<t></t>d{EOS}"),
        # As docs/one_gpu.md says.
        (template(QWEN), "ab", "all", f"{EMPTY}b{EOS}"),
        (template(QWEN), "abcd", "all", f"b{EOS}{EMPTY}d{EOS}"),
        (template(QWEN), ("a", f"{THOUGHT}b"), "all", f"{THOUGHT}b{EOS}"),
        (template(QWEN), ("a", f"{THOUGHT}b", "c", f"{THOUGHT}d"), "last", f"{THOUGHT}d{EOS}"),
        (template(SILENT), "ab", "all", f"b{EOS}"),
        (template(SILENT), "abcd", "last", f"d{EOS}"),
    ],
)
def test_what_a_template_writes_into_an_answer_is_learned(tokenizer, which, texts, answers, learned):
    assert learnt(chat(*texts), tokenizer, which, answers=answers) == learned


test_thoughts_that_qwen3_s_template_drops_or_rewrites = refusals(
    (of_texts(QWEN, "a", f"{THOUGHT}b", "c", "d"), "turn 2", "verbatim"),
    (of_texts(QWEN, "a", "<think>hm</think>b"), "turn 2", "verbatim"),
    (of_texts(SILENT, *"abcd"), "turn 2", "earlier turns differently"),
)


def test_texts_are_learned_whole_and_as_they_stand(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one two three", "article": "x"}\n{"text": "four"}\n')
    chats = read_chats(path)
    assert [chat.turns for chat in chats] == [(Turn("text", "one two three"),), (Turn("text", "four"),)]
    template = ChatTemplate("{{ raise_exception('not used') }}", "none")
    (whole, [span]), _ = find_answers(template, chats)
    assert (whole, span.start, span.end) == ("one two three", 0, 13)


def test_texts_start_with_what_the_tokenizer_puts_before_them(tokenizer):
    chats = [Chat((Turn("text", "one two three"),)), chat("a", "b")]
    with_bos = Tokenizer.from_str(tokenizer.to_str())
    bos = tokenizer.token_to_id(BOS)
    with_bos.post_processor = processors.TemplateProcessing(f"{BOS} $A {EOS}", None, [(BOS, bos), (EOS, 0)])
    without, expected = (
        tokenize_chats(chats, tokenizer, template(), 64, start=leading_ids(t))[0]
        for t in (tokenizer, with_bos)
    )
    ids = without["input_ids"][0].tolist()
    assert expected["input_ids"][0].tolist() == [bos, *ids]
    assert expected["loss_mask"][0].tolist() == [0, *[1] * len(ids)]
    assert without["loss_mask"][0].tolist() == [0, *[1] * (len(ids) - 1)]
    chats = [Chat((Turn("text", f"{BOS}one two three"),))]
    rendered, _ = tokenize_chats(chats, tokenizer, template(), 64, start=leading_ids(with_bos))
    assert rendered["input_ids"][0].tolist() == [bos, *ids]
    for name in ("input_ids", "loss_mask"):
        assert expected[name][1].tolist() == without[name][1].tolist()


def test_many_conversations_are_rendered_together_and_the_failing_one_is_named(tokenizer, monkeypatch):
    asked, run_job = [], chat_template.run_job
    monkeypatch.setattr(
        chat_template, "run_job", lambda *a, **k: asked.append(k.get("calls", ())) or run_job(*a, **k)
    )
    chats = [chat(f"say {n}", f"it is {n}", place=f"f:{n}") for n in range(100)]
    together, _ = tokenize_chats(chats, tokenizer, which := template(), 64)
    assert [*map(len, asked)] == [0, 128, 72]  # the first compiles the template
    alone = [tokenize_chats([one], tokenizer, which, 64)[0] for one in chats]
    for name, column in together.items():
        assert all((found == columns[name][0]).all() for found, columns in zip(column, alone, strict=True))
    fails = template(
        CHATML.replace("m['content']", "(m.content if m.content != 'say 70' else raise_exception('no'))")
    )
    with pytest.raises(ValueError, match=mentions("f:70", "toy.json", "no")):
        tokenize_chats(chats, tokenizer, fails, 64)


def test_an_answer_that_occurs_in_the_template_too_is_found_where_it_was_rendered():
    said = "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}|"
    source = "{% for m in messages %}{{ m.role }}: " + said + "{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    chat = Chat((Turn("user", "What do you do?"), Turn("assistant", "think")))
    ((whole, [span]),) = find_answers(ChatTemplate(source, "t"), [chat])
    assert (span.text, span.text_end) == (len(whole) - 6, len(whole) - 1)
