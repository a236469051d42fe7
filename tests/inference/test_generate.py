"""Which conversations `loraplus generate` answers, and how it searches; whole runs are in `tests/integration`."""

import json

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.data.options import DataOptions
from loraplus_jax.inference.generate import _chats
from loraplus_jax.models.files import open_files
from loraplus_jax.models.options import ModelOptions
from loraplus_jax.settings.schema import Settings
from loraplus_jax.tasks import chat_generation
from loraplus_jax.tasks.causal_lm import LanguageTask

from ..integration import language_world
from ..integration.runs import flags, printed
from ..messages import assert_mentions


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
        model=ModelOptions(path=str(tmp_path)),
        data=DataOptions(path=str(path), template=str(template), max_length=64),
        task="instruction",
        output_dir="out",
    )
    data = LanguageTask.load(settings.task_options, open_files(tmp_path))
    for line, words in zip(data.summary, (("system", 10), ("last answer", 5)), strict=True):
        assert_mentions(line, *words)
    chats = _chats((), str(path), None, settings, distinct=True)
    assert [chat.turns[-1].text for chat in chats[1:3]] == ["say", "what is is "]
    assert [json.loads(chat.tools) for chat in chats] == [[tool]] * 10


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_generate_searches_with_beams_where_it_is_asked_to(talk, capsys, monkeypatch):
    class Asked(OSError):
        """What is searched with; nothing is compiled."""

    def make_beam_search(*_, **options):
        raise Asked(
            ", ".join(f"{name} {options[name]}" for name in ("beams", "length_penalty", "no_repeat_ngram"))
        )

    asked = ("generate", talk.model, "--prompt", "what colour is snow", "--max_tokens", "4")
    with monkeypatch.context() as patch:
        patch.setattr(chat_generation, "make_beam_search", make_beam_search)
        assert main([*map(str, asked), *flags("--beams 3 --length_penalty 0.5 --no_repeat_ngram 2")]) == 2
        assert_mentions(capsys.readouterr().err, "beams 3", "length_penalty 0.5", "no_repeat_ngram 2")
        printed(capsys, *asked)  # greedily
    for given, words in {
        ("--beams", "0"): ("beams", 0),
        ("--beams", "1000"): ("--beams", 1000, "vocabulary"),
        ("--length_penalty", "2"): ("--length_penalty 2", "--beams"),
    }.items():
        assert main([*map(str, asked), *given]) == 2
        assert_mentions(capsys.readouterr().err, *words)
