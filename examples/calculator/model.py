"""The calculator's policy before any training: a BPE tokenizer made on the spot and a tiny Llama with random weights.

Promise to whoever records tokens: the chat template writes an assistant's turn as its content and <|end|>, which is
what the model itself generates, and nothing else. So the prompt of a second turn begins with exactly the tokens of
the first prompt and its response, whenever the sampled text is tokenised as it was sampled, and both turns make one
sequence to train on.
"""

from __future__ import annotations

from random import Random
from typing import Any, Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.calculator.demonstrations import demonstration

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
ROLES: Final = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
MAX_POSITIONS: Final = 256
VOCABULARY: Final = 256
"""At most; the corpus has few words, so training stops before it."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] or '') + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

# Words with the space before them, single digits, single other characters: joined again they are the text.
_PIECES = r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9]"


def train_tokenizer(seed: int, conversations: int = 3_000) -> PreTrainedTokenizerFast:
    """Learns its merges from demonstrations; every printable ASCII character has a token of its own."""
    rng = Random(f"tokenizer {seed}")
    texts = [message["content"] for _ in range(conversations) for message in demonstration(rng)]
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, UNKNOWN, *ROLES],
        initial_alphabet=[chr(code) for code in range(32, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """0.4M parameters. The large initial range lets so small a model learn quickly: 0.02 needs twice the steps.

    Heads of 32 and an output layer of its own are for vLLM's CPU build: its attention takes no smaller ones, and tied
    embeddings would keep the old output layer when weights are loaded.
    """
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=None,
        **ids,
    )
    return LlamaForCausalLM(config)
