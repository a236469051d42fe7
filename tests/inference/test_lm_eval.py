"""Our models in lm-eval against transformers' in lm-eval, and `loraplus eval --tasks` against lm-eval's tasks."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from loraplus_jax.data.mmlu import COLUMNS
from loraplus_jax.inference import eval_tasks
from loraplus_jax.inference.scoring import Scorer

from ..data.test_mmlu import write_mmlu
from ..integration import language_world as tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CONTEXT = 512
# Ends a prompt without whitespace, which lm-eval would move to the choice.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA:"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
WORDS = ["answer1", "answer2", "answer3", "answer4"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Llama whose tokenizer adds BOS, the files of two tasks, and a chat template."""
    directory = tmp_path_factory.mktemp("lm_eval")
    (directory / "model").mkdir()
    end = tiny.vocabulary()[0].index(tiny.STOP)
    tiny.write_model(directory / "model", max_position_embeddings=CONTEXT, eos_token_id=end)
    file = str(directory / "model/tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    bos = (tiny.TURN, tokenizer.token_to_id(tiny.TURN))
    tokenizer.post_processor = processors.TemplateProcessing(f"{tiny.TURN} $A", special_tokens=[bos])
    tokenizer.save(file)
    (directory / "template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    rng = np.random.default_rng(0)
    rows = []
    for n in range(9):
        text = f"{'tell me ' * n}what colour is {n} ?\n\nAnswer format: {'/'.join(WORDS)}"
        word = str(rng.choice(WORDS))
        rows.append(
            {"instruction": text, "input": "", "output": f"the correct answer is {word}", "answer": word}
        )
    folder = directory / eval_tasks.COMMONSENSE["arc_easy"]
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps(rows))
    questions = [[f"is {n} {'green ' * n}?", "yes", "no", str(n), "2", "ABCD"[n % 4]] for n in range(12)]
    write_mmlu(directory / "mmlu", "world_religions", questions[:3], questions[3:])
    return directory


@pytest.fixture(scope="module")
def ours(directory):
    from loraplus_jax.inference.lm_eval import LoRAPlusLM

    return LoRAPlusLM(directory / "model", batch_size=4, template=str(directory / "template.jinja"))


@pytest.fixture(scope="module")
def theirs(directory):
    """The same model in transformers, as lm-eval runs it."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "model/tokenizer.json"),
        bos_token=tiny.TURN,
        eos_token=tiny.STOP,
        pad_token=tiny.END,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT, device="cpu")


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def test_log_likelihoods_are_those_of_transformers(ours, theirs):
    texts = [
        ("what colour is snow?", " it is white"),
        ("what colour is snow? ", "green"),
        ("", "it is coal"),
        *[("tell me now", f" {letter}") for letter in "ABCD"],
        ("just " * (CONTEXT + 40), "again the grass"),
    ]
    found, expected = (lm.loglikelihood(requests("loglikelihood", *texts)) for lm in (ours, theirs))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    # All tokens after one text: one of them is the greedy one.
    context = ours.tok_encode("what colour is snow?")
    tokens = [(("", ""), context, [token]) for token in range(len(tiny.vocabulary()[0]))]
    found, expected = (lm._loglikelihood_tokens(tokens) for lm in (ours, theirs))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert sum(greedy for _, greedy in found) == 1


def test_whole_texts_in_windows_are_those_of_transformers(ours, theirs):
    texts = [("it is green",), ("what colour is the blood, " * 90,)]
    assert len(ours.tok_encode(texts[1][0])) > CONTEXT
    found, expected = (lm.loglikelihood_rolling(requests("rolling", *texts)) for lm in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_with_the_chat_template_answers_end_as_its_turns_do(directory, monkeypatch):
    from loraplus_jax.inference.lm_eval import LoRAPlusLM

    end = Tokenizer.from_file(str(directory / "model/tokenizer.json")).token_to_id(tiny.END)
    (directory / "other.jinja").write_text(TEMPLATE.replace("{{ eos_token }}", tiny.END))
    model = LoRAPlusLM(directory / "model", batch_size=4, template=str(directory / "other.jinja"))
    stops, make = [], model._make_program
    monkeypatch.setattr(model, "_program", lambda new, stop: (stops.append(stop), make(new, stop))[1])
    model.generate_until(requests("generate_until", ("what", {"max_gen_toks": 2})))
    prompt = model.apply_chat_template([{"role": "user", "content": "what"}])
    model.generate_until(requests("generate_until", (prompt, {"max_gen_toks": 2})))
    assert [end in stop for stop in stops] == [False, True]


def test_generated_texts_are_those_of_transformers(ours, theirs):
    (longest,) = ours.generate_until(requests("generate_until", ("what", {"max_gen_toks": 12})))
    middle = longest[len(longest) // 2]
    texts = [
        *[(text, {"max_gen_toks": 12, "until": []}) for text in ("what", "tell me", "snow is", "a", "coal")],
        ("what", {"max_gen_toks": 12, "until": [middle]}),
        ("just " * (CONTEXT + 40), {"max_gen_toks": 5, "until": ["\n\n"], "do_sample": False}),
    ]
    found, expected = (lm.generate_until(requests("generate_until", *texts)) for lm in (ours, theirs))
    assert found == expected
    assert middle not in found[5]
    with pytest.raises(ValueError, match="top_k"):
        ours.generate_until(requests("generate_until", ("what", {"top_k": 3})))


def commonsense_task(root, name):
    """LLM-Adapters' file as a task of lm-eval."""
    choices = [f"the correct answer is {word}" for word in WORDS]
    return {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(root / eval_tasks.COMMONSENSE[name] / "test.json")},
            "cache_dir": str(root / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{instruction}}\nA:",
        "doc_to_choice": choices,
        "doc_to_target": "{{output}}",
        "metric_list": [{"metric": "acc"}],
    }


def mmlu_task(root, shots):
    """The file of a subject as a task of lm-eval, with the options of its own `mmlu`."""
    files = {split: str(root / f"mmlu/{split}/world_religions_{split}.csv") for split in ("dev", "test")}
    return {
        "task": "local_mmlu",
        "dataset_path": "csv",
        "dataset_kwargs": {
            "data_files": files,
            "names": list(COLUMNS),
            "cache_dir": str(root / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "output_type": "multiple_choice",
        "description": "The following are multiple choice questions (with answers) about world religions.\n\n",
        "doc_to_text": "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }


@pytest.mark.parametrize("name", ["arc_easy", "mmlu"])
def test_tasks_agree_with_lm_eval_for_every_choice(directory, ours, theirs, name, monkeypatch, tmp_path):
    """The same log-likelihoods of every choice, and the same accuracy."""
    from lm_eval.tasks import TaskManager

    options = {"shots": 3} if name == "mmlu" else {"template": str(directory / "template.jinja")}
    task = mmlu_task(directory, 3) if name == "mmlu" else commonsense_task(directory, name)
    scores = []

    class Recorder(Scorer):
        def __call__(self, continuations):
            scores.extend(super().__call__(continuations))
            return scores

    monkeypatch.setattr(eval_tasks, "Scorer", Recorder)
    output = tmp_path / "results.json"
    results, _ = eval_tasks.evaluate_tasks(
        str(directory / "model"), [name], directory, output=output, **options
    )
    # Without reading the files of all of lm-eval's own tasks.
    manager = TaskManager(include_defaults=False)
    for lm in (ours, theirs):
        found = lm_eval.simple_evaluate(
            model=lm, tasks=[task], log_samples=True, bootstrap_iters=0, task_manager=manager
        )
        samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
        likelihoods = np.array([float(x) for sample in samples for x, _ in sample["filtered_resps"]])
        np.testing.assert_allclose(likelihoods, [score.log_likelihood for score in scores], atol=1e-4)
        assert found["results"][task["task"]]["acc,none"] == pytest.approx(results.tasks[name].accuracy)
