"""A byte-level BPE tokenizer.json of 512 tokens, learned from the training chapters: <|eos|>, 256 bytes, 255 merges."""
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|eos|>"
VOCABULARY = 512


def learn(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, text):
    """A chapter's ids: the end of the text before it, its own tokens, its end."""
    end = tokenizer.token_to_id(END)
    return [end, *tokenizer.encode(text).ids, end]
