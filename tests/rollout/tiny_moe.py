"""A small random Qwen3-MoE with a tokenizer, made on the spot; what transformers says about its log-probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 512
TEXT = [
    "Write a short letter to a friend about the rain.",
    "The quick brown fox jumps over the lazy dog while the sun sets behind the hills, slowly.",
    "0 1 2 3 4 5 6 7 8 9. Tell me plainly what happened and what it cost; do not console anyone.",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be encoded. ``<|im_end|>`` ends a turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


def make_model(directory: Path, seed: int, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """Save a random model: 4 layers, hidden 64, 8 experts, 2 of them a token; `tied`: the head is the embeddings."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def log_softmax(directory: Path, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """transformers' log-probabilities float32 [len(ids), vocabulary] of the token after each position."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    return logits.log_softmax(-1).numpy()


def token_logprobs(directory: Path, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Log-probability of each token of `ids` given those before it, from the second on: float32 [len(ids) - 1]."""
    return log_softmax(directory, ids)[np.arange(len(ids) - 1), ids[1:]]


def experts_chosen(directory: Path, ids: np.ndarray) -> np.ndarray:
    """The experts transformers sends each token to, sorted, int [len(ids), layers, 2]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None], output_router_logits=True).router_logits
    return np.stack([layer.topk(2, -1).indices.sort(-1).values.numpy() for layer in logits], axis=1)
