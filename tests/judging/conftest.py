"""Tokenizers of the two kinds that judges come with, trained in the test on a few sentences."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent))  # the test modules share helpers, and importlib mode adds no path

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "Judge. Question: Answer: Criterion: Tier [0] Tier [1] Tier [2] user assistant system im_start im_end",
    "The narrator states what happened and what it cost, without consoling the reader. <|im_end|> <|im_start|>",
    "Write a short note about the sea. The sea was grey and the boats were in before noon. 0: No. 1: Yes.",
] * 20


def byte_level_bpe() -> Tokenizer:
    """The kind of GPT-2 and Qwen: control tokens live outside the model's vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in CONTROL])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return tokenizer


def sentencepiece_unigram() -> Tokenizer:
    """A converted sentencepiece model: control tokens are pieces of the vocabulary as well, and NFKC folds text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=400, model_type="unigram", byte_fallback=True,
        user_defined_symbols=[*CONTROL, *"0123456789"], minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, sp.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ["<unk>", "<s>", "</s>", *CONTROL]])
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """A converted sentencepiece BPE model (the kind of Llama 2): merges are rebuilt from the vocabulary, so they can
    spell control pieces too."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        user_defined_symbols=[*CONTROL, *"0123456789"], minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    merges = [(p[:i], p[i:]) for p in vocab for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    merges.sort(key=lambda pair: vocab["".join(pair)])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ["<unk>", "<s>", "</s>", *CONTROL]])
    return tokenizer


@pytest.fixture(
    scope="session",
    params=[byte_level_bpe, sentencepiece_unigram, sentencepiece_bpe],
    ids=["bpe", "sentencepiece-unigram", "sentencepiece-bpe"],
)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()
