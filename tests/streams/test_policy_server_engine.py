"""The engine against transformers' plain forward: batching, greedy, cancelling and swapping change no number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from examples.calculator.model import train_tokenizer
from fulgurite.streams.policy_server.engine import Engine, Generation
from fulgurite.streams.policy_server.forward import AnyForward
from fulgurite.streams.policy_server.policy import Policy, PolicyRefused, load_policy
from fulgurite.streams.policy_server.protocol import version_spans
from tests.streams.policy_server_support import assert_exact, make_model, plain_logprobs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("models")
    return make_model(base / "one", 1), make_model(base / "two", 2)


@pytest.fixture(scope="module")
def policies(folders: tuple[Path, Path]) -> dict[str, Policy]:
    one = load_policy(folders[0])
    return {"1": one, "2": load_policy(folders[1], like=one)}


def prompts(count: int) -> list[list[int]]:
    """Of many lengths, from 1 token to 150."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(7, 200, (1 + 37 * n % 150,), generator=generator).tolist() for n in range(count)]


def run(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def check(policies: dict[str, Policy], generation: Generation) -> None:
    assert_exact(policies, generation.prompt, generation.tokens, generation.logprobs, version_spans(generation))


def test_more_requests_than_rows_each_exact_greedy_beside_sampled(policies: dict[str, Policy]) -> None:
    engine = Engine(policies["1"], "1")
    generations = [
        Generation(prompt, max_tokens=3 + n % 13, temperature=0.0 if n % 3 == 0 else 1.0)
        for n, prompt in enumerate(prompts(70))
    ]
    for generation in generations:
        engine.submit(generation)
    run(engine)
    for generation in generations:
        check(policies, generation)
        if generation.temperature == 0:
            plain = plain_logprobs(policies["1"], generation.prompt, generation.tokens)
            assert plain.argmax(dim=-1).tolist() == generation.tokens


def test_swap_in_the_middle_of_32_requests(policies: dict[str, Policy]) -> None:
    engine = Engine(policies["1"], "1")
    generations = [Generation(prompt, max_tokens=24) for prompt in prompts(32)]
    for generation in generations:
        engine.submit(generation)
    for _ in range(9):
        engine.step()
    engine.swap(policies["2"], "2")
    run(engine)
    assert sum(len(generation.versions) == 2 for generation in generations) > 20
    for generation in generations:
        check(policies, generation)


def test_the_oracle_tells_the_versions_apart(policies: dict[str, Policy]) -> None:
    engine = Engine(policies["1"], "2")  # a wrong label
    generation = Generation(prompts(5)[4], max_tokens=20)
    engine.submit(generation)
    run(engine)
    with pytest.raises(AssertionError):
        check(policies, generation)


def test_temperature_one_samples_the_distribution(policies: dict[str, Policy]) -> None:
    engine = Engine(policies["1"], "1")
    prompt = [10, 11, 12]
    generations = [Generation(prompt, max_tokens=1) for _ in range(2_000)]
    for generation in generations:
        engine.submit(generation)
    run(engine)
    counts = torch.bincount(torch.tensor([g.tokens[0] for g in generations]), minlength=policies["1"].vocabulary)
    expected = plain_logprobs(policies["1"], prompt, [0])[0].exp()
    # For multinomial counts the sum below has mean (categories - 1) and standard deviation sqrt(2 * (categories - 1)).
    statistic = float(((counts - 2_000 * expected) ** 2 / (2_000 * expected)).sum())
    degrees = len(expected) - 1
    assert statistic < degrees + 6 * (2 * degrees) ** 0.5


def test_a_seed_makes_a_request_repeatable_in_any_company(policies: dict[str, Policy]) -> None:
    def sample(company: int) -> list[int]:
        engine = Engine(policies["1"], "1")
        for prompt in prompts(company):
            engine.submit(Generation(prompt, max_tokens=30))
        seeded = Generation([10, 11, 12], max_tokens=20, seed=5)
        engine.submit(seeded)
        run(engine)
        return seeded.tokens

    assert sample(0) == sample(7)


def test_stops_at_the_end_token_and_at_max_tokens(policies: dict[str, Policy]) -> None:
    everything_stops = replace(policies["1"], stop_ids=frozenset(range(policies["1"].vocabulary)))
    nothing_stops = replace(policies["1"], stop_ids=frozenset[int]())
    for policy, reason, count in ((everything_stops, "stop", 1), (nothing_stops, "length", 12)):
        generation = Generation([9, 10], max_tokens=12)
        engine = Engine(policy, "1")
        engine.submit(generation)
        run(engine)
        assert (generation.finish_reason, len(generation.tokens)) == (reason, count)


def test_cancelling_leaves_the_others_exact(policies: dict[str, Policy]) -> None:
    engine = Engine(policies["1"], "1")
    generations = [Generation(prompt, max_tokens=30) for prompt in prompts(70)]
    for generation in generations:
        engine.submit(generation)
    for _ in range(4):
        engine.step()
    cancelled = [generations[0], generations[20], generations[-1]]
    for generation in cancelled:
        engine.cancel(generation)
    run(engine)
    for generation in generations:
        if generation not in cancelled:
            assert generation.finish_reason in ("stop", "length")
            check(policies, generation)


def test_abort_ends_everything_with_what_it_has(policies: dict[str, Policy]) -> None:
    engine = Engine(policies["1"], "1")
    generations = [Generation(prompt, max_tokens=30) for prompt in prompts(70)]
    for generation in generations:
        engine.submit(generation)
    engine.step()
    engine.step()
    ended = engine.abort()
    assert engine.idle
    assert {id(generation) for generation in ended} <= {id(generation) for generation in generations}
    assert all(generation.finish_reason == "abort" for generation in ended)
    check(policies, next(generation for generation in ended if generation.tokens))


def test_any_other_architecture_is_served_by_transformers_forward(tmp_path: Path) -> None:
    torch.manual_seed(4)
    tokenizer = train_tokenizer(seed=1, conversations=300)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    policy = load_policy(tmp_path / "qwen")
    assert isinstance(policy.forward, AnyForward)
    engine = Engine(policy, "1")
    generations = [Generation(prompt, max_tokens=10) for prompt in prompts(9)]
    for generation in generations:
        engine.submit(generation)
    run(engine)
    for generation in generations:
        check({"1": policy}, generation)


def test_folders_that_cannot_be_served_are_refused(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    policy = load_policy(folders[0])
    with pytest.raises(PolicyRefused, match=r"no config\.json"):
        load_policy(tmp_path / "nothing")

    broken = make_model(tmp_path / "broken", 1)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1_000])
    with pytest.raises(PolicyRefused, match="cannot be loaded"):
        load_policy(broken)

    nan = make_model(tmp_path / "nan", 1)
    tensors = load_file(nan / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, nan / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyRefused, match="not finite"):
        load_policy(nan, like=policy)

    torch.manual_seed(1)
    wider = make_model(tmp_path / "wider", 1)
    config = policy.model.config.__class__.from_pretrained(wider)
    config.intermediate_size = 128
    policy.model.__class__(config).save_pretrained(wider)
    with pytest.raises(PolicyRefused, match="another architecture"):
        load_policy(wider, like=policy)

    silent = make_model(tmp_path / "silent", 1)
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(PolicyRefused, match="chat template"):
        load_policy(silent)
