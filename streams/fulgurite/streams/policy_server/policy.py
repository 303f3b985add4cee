"""A policy: a model and its tokenizer, read from one folder in Hugging Face format, and proof that we can serve it.

Promises: a folder becomes a Policy completely or raises PolicyRefused with what is wrong with it; weights come from
safetensors only (a pickle could run code) and no code of the folder is run; the model is in fp32, in eval mode. Knows
nothing of requests.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from fulgurite.schemas.errors import FulguriteError
from fulgurite.streams.policy_server.cache import KeyValueCache, decode_mask, prefill_mask
from fulgurite.streams.policy_server.forward import Forward, forward_of

logger = logging.getLogger(__name__)

_MAX_SELF_CHECK_DIFFERENCE = 1e-3
"""Between logits of our cached decoding and of a plain forward; fp32 rounding gives about 1e-6."""


class PolicyRefused(FulguriteError):
    """The folder cannot be served: it is no model, of another architecture than the one served, or broken."""


@dataclass(frozen=True, eq=False)
class Policy:
    """What answers. Immutable: a new version is a new Policy, so that a swap is one assignment."""

    folder: Path
    model: PreTrainedModel
    forward: Forward
    tokenizer: PreTrainedTokenizerFast
    stop_ids: frozenset[int]
    max_positions: int
    vocabulary: int
    longest_token_chars: int
    _token_texts: dict[int, str] = field(default_factory=dict, init=False)

    def token_text(self, token: int) -> str:
        """The text of one token, special ones included."""
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = str(self.tokenizer.decode([token]))
        return text

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every parameter's bytes, by name."""
        found: dict[str, str] = {}
        for name, tensor in self.model.state_dict().items():
            found[name] = hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        return found

    def new_cache(self) -> KeyValueCache:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return KeyValueCache(layers=config.num_hidden_layers, heads=heads, width=width)


def load_policy(folder: Path, like: Policy | None = None) -> Policy:
    """Reads the folder; with `like`, tensors must have the names and shapes of that policy's. Raises PolicyRefused."""
    try:
        return _load(folder, like)
    except PolicyRefused:
        raise
    except Exception as error:
        # A file that is broken can make the libraries raise anything, a ZeroDivisionError as well as an OSError.
        logger.warning("%s cannot be loaded", folder, exc_info=True)
        raise PolicyRefused(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error


def _load(folder: Path, like: Policy | None) -> Policy:
    if not (folder / "config.json").is_file():
        raise PolicyRefused(f"{folder} is not a model's folder: it has no config.json")
    disable_progress_bar()  # one would be written for every version
    # dtype: trainer and server must round alike for their logprobs to agree.
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.chat_template is None:
        raise PolicyRefused(
            f"{folder} has no fast tokenizer with a chat template (tokenizer.json, chat_template.jinja)"
        )
    if like is not None:
        _check_same_architecture(folder, model, like)
    model.eval().requires_grad_(False)
    policy = Policy(
        folder=folder,
        model=model,
        forward=forward_of(model),
        tokenizer=tokenizer,
        stop_ids=_stop_ids(model, tokenizer),
        max_positions=_max_positions(folder, model),
        vocabulary=int(model.config.get_text_config().vocab_size),
        longest_token_chars=max(len(token) for token in tokenizer.get_vocab()),
    )
    _self_check(policy)
    _check_tokenizer(policy)
    return policy


def _max_positions(folder: Path, model: Any) -> int:
    found = int(model.config.get_text_config().max_position_embeddings)
    if found < 2:
        raise PolicyRefused(f"{folder} has max_position_embeddings = {found}: no room for a prompt and an answer")
    return found


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None)


def _check_same_architecture(folder: Path, model: Any, like: Policy) -> None:
    if type(model) is not type(like.model):
        raise PolicyRefused(f"{folder} holds a {type(model).__name__}; {type(like.model).__name__} is being served")
    ours = {name: tuple(tensor.shape) for name, tensor in like.model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if ours != theirs:
        first = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))[0]
        raise PolicyRefused(
            f"{folder} has another architecture: {first} is {theirs.get(first)}, served is {ours.get(first)}"
        )


def _check_tokenizer(policy: Policy) -> None:
    """A chat of one message must become tokens: nothing before reads the template."""
    try:
        text = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
        )
        empty = not policy.tokenizer.backend_tokenizer.encode(str(text), add_special_tokens=False).ids
    except Exception as error:
        # A template is a program: it can raise anything.
        reason = f"{type(error).__name__}: {error}"
        raise PolicyRefused(f"{policy.folder} has a chat template that fails on one message: {reason}") from error
    if empty:
        raise PolicyRefused(f"{policy.folder} has a chat template that makes nothing of one message")


@torch.inference_mode()
def _self_check(policy: Policy) -> None:
    """Three tokens through our cache must give what a plain forward gives; also finds weights that are not finite."""
    layers = set(getattr(policy.model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise PolicyRefused(
            f"{policy.folder} has layers of type {sorted(layers)}; only full_attention can be served here"
        )
    ids = torch.tensor([[1, 2, 3]]) % policy.vocabulary
    plain = policy.model(input_ids=ids, use_cache=False).logits[0, -1]
    if not bool(torch.isfinite(plain).all()):
        raise PolicyRefused(f"{policy.folder} has weights that give logits which are not finite")
    cache = policy.new_cache()
    cache.reserve(rows=1, length=3)
    cache.prepare_prefill(first_row=0, rows=1, length=2)
    policy.forward(ids[:, :2], torch.arange(2)[None], prefill_mask(2), torch.tensor([1]), cache)
    third = torch.tensor([2])
    cache.prepare_decode(positions=third, length=3)
    cached = policy.forward(ids[:, 2:], third[None], decode_mask(third, 3), torch.tensor([0]), cache)[0]
    difference = float((plain - cached).abs().max())
    if difference > _MAX_SELF_CHECK_DIFFERENCE:
        raise PolicyRefused(
            f"{policy.folder}: {type(policy.model).__name__} is not decoded exactly here: "
            f"logits differ by {difference:.2g}"
        )
