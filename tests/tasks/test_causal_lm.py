"""The digests that recognize the data of a run, and what becomes of the conversations of a file."""

import json

from loraplus_jax.data.batches import digest
from loraplus_jax.data.conversations import Chat, Turn
from loraplus_jax.data.data_to_text import Description
from loraplus_jax.data.multiple_choice import Question
from loraplus_jax.inference.generate import _chats
from loraplus_jax.settings.schema import DataSettings, ModelSettings, Settings
from loraplus_jax.tasks.causal_lm import _digest, load_data

from ..integration import language_world
from ..messages import assert_mentions

TURNS = (Turn("user", "a"), Turn("assistant", "b"))
PLAIN = [["user", "a"], ["assistant", "b"]]


def test_digests_do_not_change_with_fields_that_an_example_does_not_use():
    examples = [Chat(TURNS, "f:1"), Question("a", ("b", "c"), 0, "f:2"), Description(TURNS, "f:3", mr="m")]
    assert _digest(examples) == digest([[PLAIN, ""], ["a", ["b", "c"], 0, ""], [PLAIN, "", "m"]])


def test_digests_see_weights_calls_and_tools_and_not_what_is_left_out():
    plain = _digest([Chat(TURNS)])
    others = [
        (TURNS[0], Turn("assistant", "b", trained=False)),
        (TURNS[0], Turn("assistant", "b", extra="{}")),
    ]
    assert (
        len({plain, *(_digest([Chat(turns)]) for turns in others), _digest([Chat(TURNS, tools="[]")])}) == 4
    )
    assert _digest([Chat(TURNS, "f:9", dropped=TURNS)]) == plain


def test_what_training_leaves_out_is_counted_and_what_generate_answers(tmp_path):
    language_world.write_model(tmp_path)
    tool = {"name": "what"}
    rows = []
    for n in range(10):
        said = [("system", " "), ("user", f"what {'is ' * n}"), ("assistant", "it"), ("user", "say")][
            : 3 + n % 2
        ]
        rows.append({"messages": [{"role": role, "content": text} for role, text in said], "tools": [tool]})
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    template = tmp_path / "tools.jinja"
    template.write_text("{{ tools | tojson }}" + language_world.TEMPLATE)
    settings = Settings(
        model=ModelSettings(path=str(tmp_path)),
        data=DataSettings(path=str(path), template=str(template), max_length=64),
        task="instruction",
        output_dir="out",
    )
    data = load_data(settings, tmp_path)
    for line, words in zip(data.summary, (("system", 10), ("last answer", 5)), strict=True):
        assert_mentions(line, *words)
    chats = _chats((), str(path), None, settings)
    assert [chat.turns[-1].text for chat in chats[1:3]] == ["say", "what is is "]
    assert [json.loads(chat.tools) for chat in chats] == [[tool]] * 10
