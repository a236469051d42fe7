"""The processes that `end_to_end.py` compares with: PEFT in transformers' Trainer, or in TRL's SFTTrainer.

The argument is the job's JSON file. The process reads the examples, tokenizes, trains and evaluates, as its users'
scripts do, and writes what it measured to the file that the job names.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Sequences = Iterable[Sequence[int]]
"""Tokens of texts."""


def fingerprint(sequences: Sequences) -> str:
    """A hash of token sequences that does not depend on their order."""
    return hashlib.sha256(json.dumps(sorted(map(list, sequences))).encode()).hexdigest()[:16]


def peak_bytes() -> int:
    """The highest resident memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def recorder(log_every: int) -> tuple[type, Any]:
    """A class to mix into a Trainer, and the callback that keeps the rows of a run.

    A row has the time and the step; one about training, of all steps since the last, also their seconds and tokens,
    of text and in all; one about an evaluation its seconds and metrics.
    """
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]

    class Counting:
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            mask, size = inputs.get("attention_mask"), inputs["input_ids"].numel()
            # TRL's packed batches have neither padding nor a mask.
            callback.tokens.append((size if mask is None else int(mask.sum()), size))
            return super().training_step(model, inputs, *rest, **more)  # pyright: ignore[reportAttributeAccessIssue]

        def evaluate(self, *rest: Any, **more: Any) -> Any:
            start = time.perf_counter()
            metrics = super().evaluate(*rest, **more)  # pyright: ignore[reportAttributeAccessIssue]
            callback.rows[-1]["evaluation_s"] = time.perf_counter() - start
            return metrics

    class Rows(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[dict[str, Any]] = []
            self.tokens: list[tuple[int, int]] = []

        def write(self, step: int, **values: Any) -> None:
            self.rows.append({"step": step, "wall": time.time(), **values})
            self.clock = time.perf_counter()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.write(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % log_every == 0 or state.global_step == state.max_steps:
                text, size = (sum(n) for n in zip(*self.tokens, strict=True))
                seconds = time.perf_counter() - self.clock
                self.write(state.global_step, seconds=seconds, text=text, size=size)
                self.tokens.clear()

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            self.write(
                state.global_step, metrics={k: v for k, v in metrics.items() if "loss" in k or "acc" in k}
            )

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.clock = time.perf_counter()

    callback = Rows()
    return Counting, callback


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """What both Trainers are told."""
    train, optimizer = job["settings"]["train"], job["settings"]["optimizer"]
    every = min(job["eval_every"], job["steps"])
    return {
        "output_dir": job["directory"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": train["batch_size"] // job["accumulate"],
        "gradient_accumulation_steps": job["accumulate"],
        "per_device_eval_batch_size": train["eval_batch_size"],
        "learning_rate": optimizer["learning_rate"],
        "lr_scheduler_type": optimizer["schedule"],
        "warmup_steps": optimizer["warmup_steps"],
        "max_grad_norm": optimizer["max_grad_norm"] or 0.0,
        "logging_steps": train["log_every"],
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": train["keep"],
        "train_sampling_strategy": "group_by_length" if job["by_length"] else "random",
        "label_names": ["labels"],  # which Trainer does not find in a PEFT model's signature
        "seed": job["settings"]["seed"],
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }


def adapt(job: dict[str, Any], model: Any, **config: Any) -> tuple[Any, Any]:
    """The model with PEFT's adapters, and its LoRA+ optimizer; AdamW is fused, as Trainer's own is."""
    import torch  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from peft.optimizers import create_loraplus_optimizer  # pyright: ignore[reportMissingImports]

    lora, optimizer = job["settings"]["lora"], job["settings"]["optimizer"]
    sizes = {"r": lora["rank"], "lora_alpha": lora["alpha"], "lora_dropout": 0.0}
    model = get_peft_model(model, LoraConfig(**sizes, target_modules=lora["target_modules"], **config))
    rates = {"lr": optimizer["learning_rate"], "loraplus_lr_ratio": lora["lr_ratio"]}
    betas = (optimizer["b1"], optimizer["b2"])
    tx = create_loraplus_optimizer(
        model, torch.optim.AdamW, **rates, betas=betas, eps=optimizer["eps"], fused=True
    )
    return model, tx


def run(trainer: Any, test: Any) -> None:
    """Evaluates the test split, trains, and evaluates it again, as `loraplus train` does."""
    trainer.evaluate(test, metric_key_prefix="test")
    trainer.train()
    if trainer.state.max_steps % trainer.args.eval_steps:
        trainer.evaluate()
    trainer.evaluate(test, metric_key_prefix="test")
    trainer.save_model()


def classification(job: dict[str, Any]) -> tuple[list[dict[str, Any]], Callable[[], Sequences]]:
    """MiniLM with mean pooling and a new head; batches are padded to their longest text."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        AutoTokenizer,
        BertConfig,
        BertModel,
        BertPreTrainedModel,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )
    from transformers.modeling_outputs import SequenceClassifierOutput  # pyright: ignore[reportMissingImports]

    class Classifier(BertPreTrainedModel):
        """As BertForSequenceClassification, which has no mean pooling."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = BertModel(config, add_pooling_layer=False)
            self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
            self.post_init()

        def forward(
            self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None, labels: Any = None
        ) -> Any:
            hidden = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
            mask = attention_mask[..., None].to(hidden.dtype)
            logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
            loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    splits = {}
    for name, rows in json.loads(Path(job["examples"]).read_text()).items():
        texts, pairs, labels = zip(*rows, strict=True)
        given = [list(texts)] if pairs[0] is None else [list(texts), list(pairs)]
        columns = tokenizer(*given, truncation=True, max_length=job["settings"]["data"]["max_length"])
        values = zip(*columns.values(), labels, strict=True)
        splits[name] = [dict(zip((*columns, "labels"), row, strict=True)) for row in values]
    torch.manual_seed(job["settings"]["seed"])
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig.from_pretrained(job["model"], num_labels=job["classes"], **dropout)
    base = Classifier.from_pretrained(job["model"], config=config, dtype=torch.float32)
    model, tx = adapt(job, base, modules_to_save=["classifier"])
    counting, callback = recorder(job["settings"]["train"]["log_every"])
    trainer = type("Counted", (counting, Trainer), {})(
        model,
        TrainingArguments(**arguments(job)),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        optimizers=(tx, None),
        callbacks=[callback],
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
    )
    run(trainer, splits["test"])
    return callback.rows, lambda: [row["input_ids"] for row in splits["train"]]


def score(
    model: Any, tokenizer: Any, questions: list[dict[str, Any]], batch_size: int
) -> tuple[float, float]:
    """The loss of the right choices' tokens, and the share of questions whose right choice is the likeliest."""
    import torch  # pyright: ignore[reportMissingImports]

    rows = []
    for n, question in enumerate(questions):
        prompt = tokenizer.apply_chat_template(question["prompt"], add_generation_prompt=True, tokenize=False)
        first = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        for k, choice in enumerate(question["choices"]):
            rows.append((tokenizer(prompt + choice, add_special_tokens=False)["input_ids"], first, n, k))
    rows.sort(key=lambda row: len(row[0]))
    likelihoods: dict[int, dict[int, float]] = {n: {} for n in range(len(questions))}
    loss = tokens = 0.0
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids = torch.zeros((len(batch), len(batch[-1][0])), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (row, *_) in enumerate(batch):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        with torch.no_grad():
            found = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1], -1)
        found = found.gather(-1, ids[:, 1:, None])[..., 0]
        for i, (row, first, n, k) in enumerate(batch):
            likelihoods[n][k] = float(found[i, first - 1 : len(row) - 1].sum())
            if questions[n]["answer"] == k:
                loss, tokens = loss - likelihoods[n][k], tokens + len(row) - first
    right = [
        max(x, key=x.__getitem__) == q["answer"] for x, q in zip(likelihoods.values(), questions, strict=True)
    ]
    return loss / tokens, sum(right) / len(right)


def language(job: dict[str, Any]) -> tuple[list[dict[str, Any]], Callable[[], Sequences]]:
    """SmolLM2 in TRL's SFTTrainer, with its packing or without; the loss is that of the answers."""
    import torch  # pyright: ignore[reportMissingImports]
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    splits = json.loads(Path(job["examples"]).read_text())
    is_scored = job["settings"]["task"] == "multiple_choice"
    # Trainer wants texts to evaluate, also where choices are scored instead.
    chats = {
        name: Dataset.from_list(splits["train"][:1] if is_scored else rows) for name, rows in splits.items()
    }
    chats["train"] = Dataset.from_list(splits["train"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.chat_template = job["template"]
    torch.manual_seed(job["settings"]["seed"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model, tx = adapt(job, base, task_type="CAUSAL_LM")
    counting, callback = recorder(job["settings"]["train"]["log_every"])

    class Choices:
        """Evaluates by the log-likelihoods of choices."""

        def evaluate(
            self: Any, questions: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
        ) -> Any:
            questions = questions or splits["validation"]
            size = self.args.per_device_eval_batch_size
            loss, accuracy = score(self.model, tokenizer, questions, size)
            metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_accuracy": accuracy}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    # In float32, and without recomputing activations, as TRL by default does: both would make it slower on a CPU.
    own = {"bf16": False, "gradient_checkpointing": False}
    own["max_length"] = job["settings"]["data"]["max_length"]
    bases = (counting, Choices, SFTTrainer) if is_scored else (counting, SFTTrainer)
    trainer = type("Counted", bases, {})(
        model,
        SFTConfig(**arguments(job), **own, packing=job["packing"]),
        train_dataset=chats["train"],
        eval_dataset=chats["validation"],
        processing_class=tokenizer,
        optimizers=(tx, None),
        callbacks=[callback],
    )
    run(trainer, splits["test"] if is_scored else chats["test"])

    def sequences() -> Iterator[list[int]]:
        for row in trainer.train_dataset:
            start = 0
            for length in row.get("seq_lengths") or [len(row["input_ids"])]:
                yield row["input_ids"][start : start + length]
                start += length

    return callback.rows, sequences


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rows, sequences = (language if job["language"] else classification)(job)
    ended, peak = time.perf_counter(), peak_bytes()
    result = {"rows": rows, "peak_bytes": peak, "train": fingerprint(sequences())}
    # What the command would not do does not count to its time.
    result["extra_s"] = time.perf_counter() - ended
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
