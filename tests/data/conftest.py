import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .chats import specials


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE, which also adds tokens."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    texts = ["the answer is yes, the answers are no\n\nuser assistant INST", "a  b   c"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    result.train_from_iterator(texts, trainer)
    result.add_special_tokens(specials())
    return result
