"""The tiny model's tokenizer: BPE pieces learnt by sentencepiece, shipped as a byte-level Hugging Face fast tokenizer.

Sentencepiece learns the pieces; the shipped tokenizer applies them over bytes, as Qwen's does, so that every text
round-trips exactly. Digits are single tokens, no piece crosses a word border, control tokens come first.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WORDS = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n|\s+")
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE, by byte value."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def learn_pieces(texts: Iterable[str], vocab_size: int) -> list[str]:
    """BPE pieces of two or more ASCII characters, most frequent merge first, with a real space for a word's start."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(i).replace("\u2581", " ") for i in range(processor.get_piece_size())]
    return [piece for piece in pieces if len(piece) > 1 and piece.isascii() and not piece.startswith("<")]


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens. Raises ValueError when `texts` hold too few pieces."""
    alphabet = byte_alphabet()
    vocab: dict[str, int] = {token: i for i, token in enumerate((*CONTROL_TOKENS, *alphabet))}
    merges: list[tuple[str, str]] = []
    for piece in learn_pieces(texts, vocab_size + 256):
        token = "".join(alphabet[byte] for byte in piece.encode())
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        if token in vocab or not splits or " " in piece[1:] or piece == "  ":
            continue
        # Every split that can arise merges to the piece; the one whose parts came first in training leads.
        merges += sorted(splits, key=lambda pair: (max(vocab[pair[0]], vocab[pair[1]]), pair))
        vocab[token] = len(vocab)
        if len(vocab) == vocab_size:
            break
    if len(vocab) != vocab_size:
        raise ValueError(f"the texts give {len(vocab)} tokens, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_positions: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    end_of_text, _, end_of_turn = CONTROL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "bos_token": None,
        "eos_token": end_of_turn,
        "pad_token": end_of_text,
        "unk_token": None,
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
