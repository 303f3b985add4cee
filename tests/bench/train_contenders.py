"""One contender of `make bench-train`, in a process of its own: some optimizer steps on the prepared window.

    python -m tests.bench.train_contenders {ours,unshared,trl,padded} FOLDER OUT --sizes tiny --steps 4

- ours: learner.step, from samples to new weights: packing, metrics and checks included.
- unshared: the same without trainer.share_prompts.
- trl: GRPOTrainer.train of TRL, with its own loop, loss, padding, metrics and optimizer. Only what would generate and
  score is replaced with the prepared window, padded as TRL pads it: prompts left, completions right, to the longest of
  the window; so its time for generating is not counted.
- padded: the loop one would write by hand over a Hugging Face model: rows padded to the longest of their micro-batch,
  whole logits, the same loss.

All take the same model, window, loss (DAPO: token mean, clip 0.2 and 0.28 against the recorded log p), clipping of the
gradient and AdamW; the same number of positions a forward pass; the same dtype and activation checkpointing. OUT gets
seconds, losses and gradient norms of each step, the most memory, and the weights that came out. The first step warms up
and is not timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.learner import load_learner
from fulgurite.streams.trainer.sample import Sample
from tests.bench.train_batch import GROUP, MODEL, SIZES, Sizes, read_window, settings_for

VERSION = 2
"""Under training; the window's tokens are of version 1, so nothing is compared with the sampler."""
LARGE = 100_000_000
"""Parameters above which not all are written out."""


@dataclass
class Done:
    """What came of the steps."""

    seconds: list[float] = field(default_factory=list[float])
    """By the wall."""
    cpu_seconds: list[float] = field(default_factory=list[float])
    """Of this process: on a machine whose cores are shared they say more."""
    losses: list[float] = field(default_factory=list[float])
    grad_norms: list[float] = field(default_factory=list[float])


class PeakMemory:
    """The most memory in use meanwhile: torch's own count on a GPU, else the process's resident size above what it was
    before the model was loaded, looked at every few milliseconds."""

    def __init__(self) -> None:
        gc.collect()
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> PeakMemory:
        if not torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._peak - self._before

    def _look(self) -> None:
        while not self._stop.wait(0.003):
            self._peak = max(self._peak, self._process.memory_info().rss)


class Clock:
    """Times one step."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self, done: Done) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        done.seconds.append(time.perf_counter() - self._wall)
        done.cpu_seconds.append(time.process_time() - self._cpu)


def ours(folder: Path, settings: TrainerSettings, sizes: Sizes, steps: int, done: Done) -> Any:
    samples = read_window(folder)
    learner = load_learner(folder / MODEL, settings)
    for _ in range(steps):
        clock = Clock()
        result = learner.step(samples, VERSION)
        clock.stop(done)
        done.losses.append(result.loss)
        done.grad_norms.append(result.grad_norm)
    engine: Any = learner.engine
    return engine._policy.model


def padded(folder: Path, settings: TrainerSettings, sizes: Sizes, steps: int, done: Done) -> Any:
    samples = read_window(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=torch.float32)
    model = loaded.to(device)
    model.train(sizes.activation_checkpointing)  # no dropout in this model; checkpointing acts in train() only
    if sizes.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2), weight_decay=0
    )
    half = settings.dtype == "bfloat16"
    sampled = sum(sum(sample.loss_mask) for sample in samples)
    for _ in range(steps):
        clock = Clock()
        loss_of_step = 0.0
        for start in range(0, len(samples), sizes.rows):
            rows = _rows(samples[start : start + sizes.rows], device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                logits = model(input_ids=rows["token_ids"], attention_mask=rows["attended"], use_cache=False).logits
            log_p = torch.log_softmax(logits[:, :-1].float(), -1)
            current = log_p.gather(2, rows["token_ids"][:, 1:, None]).squeeze(2)
            ratio = (current - rows["behaviour"][:, 1:]).exp()
            advantages = rows["advantages"][:, None]
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
            loss = -(surrogate * rows["sampled"][:, 1:]).sum() / sampled
            loss.backward()
            loss_of_step += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.stop(done)
        done.losses.append(loss_of_step)
        done.grad_norms.append(norm)
    return model


def _rows(samples: list[Sample], device: torch.device) -> dict[str, Tensor]:
    """Padded on the right to the longest."""
    longest = max(len(sample.token_ids) for sample in samples)

    def padded(lists: list[list[Any]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*each, *[0] * (longest - len(each))] for each in lists], dtype=dtype, device=device)

    return {
        "token_ids": padded([s.token_ids for s in samples], torch.int64),
        "attended": padded([[1] * len(s.token_ids) for s in samples], torch.int64),
        "sampled": padded([s.loss_mask for s in samples], torch.float32),
        "behaviour": padded([s.behaviour_logprobs for s in samples], torch.float32),
        "advantages": torch.tensor([s.advantage for s in samples], dtype=torch.float32, device=device),
    }


class _Watch(TrainerCallback):
    """Times the optimizer steps of transformers' loop, and takes what it logs of each."""

    def __init__(self, done: Done) -> None:
        self._done = done
        self._clock = Clock()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._clock = Clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.stop(self._done)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs and "grad_norm" in logs:
            self._done.losses.append(float(logs["loss"]))
            self._done.grad_norms.append(float(logs["grad_norm"]))


def import_trl() -> Any:
    """Here and not at the top: only TRL's environment has it. Before its memory is measured: ours is imported then."""
    import datasets  # pyright: ignore # noqa: F401

    from tests.oracles.standins import load

    load("trl.trainer.grpo_config")
    return load("trl.trainer.grpo_trainer")


def trl(folder: Path, settings: TrainerSettings, sizes: Sizes, steps: int, done: Done) -> Any:
    from datasets import Dataset  # pyright: ignore

    from tests.oracles.standins import load

    module = import_trl()
    samples = read_window(folder)
    prompt_tokens = sizes.prompt_tokens
    window = _padded_as_trl_pads(samples, prompt_tokens)

    class Prepared(module.GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            return {name: tensor.to(self.accelerator.device) for name, tensor in window.items()}

    half = settings.dtype == "bfloat16"
    arguments = load("trl.trainer.grpo_config").GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=sizes.rows,
        gradient_accumulation_steps=len(samples) // sizes.rows,
        num_generations=GROUP,
        max_completion_length=sizes.longest_tokens,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        max_steps=steps,
        bf16=half,
        fp16=False,
        gradient_checkpointing=sizes.activation_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / MODEL)
    trainer: Any = Prepared(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),  # never asked
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["-"] * len(samples)}),
        processing_class=tokenizer,
        callbacks=[_Watch(done)],
    )
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model)


def _padded_as_trl_pads(samples: list[Sample], prompt_tokens: int) -> dict[str, Tensor]:
    """The dictionary its method returns. All prompts have one length here, so the left side has no padding."""
    longest = max(len(sample.token_ids) for sample in samples) - prompt_tokens

    def right(lists: list[list[Any]], dtype: torch.dtype) -> Tensor:
        completions = [each[prompt_tokens:] for each in lists]
        return torch.tensor([[*each, *[0] * (longest - len(each))] for each in completions], dtype=dtype)

    prompts = torch.tensor([sample.token_ids[:prompt_tokens] for sample in samples])
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": right([s.token_ids for s in samples], torch.int64),
        "completion_mask": right([[1] * len(s.token_ids) for s in samples], torch.int64),
        "tool_mask": right([s.loss_mask for s in samples], torch.int64),
        "old_per_token_logps": right([s.behaviour_logprobs for s in samples], torch.float32),
        "advantages": torch.tensor([s.advantage for s in samples], dtype=torch.float32),
        "num_items_in_batch": torch.tensor(sum(sum(s.loss_mask) for s in samples)),
    }


def unshared(folder: Path, settings: TrainerSettings, sizes: Sizes, steps: int, done: Done) -> Any:
    return ours(folder, settings.model_copy(update={"share_prompts": False}), sizes, steps, done)


CONTENDERS: dict[str, Callable[[Path, TrainerSettings, Sizes, int, Done], Any]] = {
    "ours": ours,
    "unshared": unshared,
    "trl": trl,
    "padded": padded,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", choices=list(SIZES), required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = SIZES[options.sizes]
    settings = settings_for(sizes, options.folder)
    torch.set_num_threads(settings.threads)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    done = Done()
    if options.contender == "trl":
        import_trl()
    with PeakMemory() as memory:
        model = CONTENDERS[options.contender](options.folder, settings, sizes, options.steps, done)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "losses": done.losses,
        "grad_norms": done.grad_norms,
        "peak_bytes": memory.peak_bytes,
    }
    (options.out / "result.json").write_text(json.dumps(found))
    torch.save(compared(model), options.out / "weights.pt")


def compared(model: Any) -> dict[str, Tensor]:
    """The weights that are looked at: all, or of a large model those of the first layer."""
    found: dict[str, Tensor] = model.state_dict()
    if sum(tensor.numel() for tensor in found.values()) > LARGE:
        found = {name: tensor for name, tensor in found.items() if ".layers.0." in name}
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


if __name__ == "__main__":
    main()
