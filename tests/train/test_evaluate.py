"""Accuracies against counting by hand, their intervals against textbook formulas, and models that are loaded."""

import math
import random

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcache_storage.errors import InputError
from logitcache_train.answers import Problem
from logitcache_train.evaluate import Accuracy, evaluate, load_model
from logitcache_train.generation import Decoding, encode_prompts, generate_responses

WORDS = ["a", "3", "b", "+", "5", "c", "*", "2", "d", "-", "4"]


def problems(count=7, seed=0):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(count)]
    return [Problem(({"role": "user", "content": text},), "3") for text in texts]


@pytest.fixture(scope="module")
def student(tmp_path_factory, make_llama, tokenizer):
    folder = tmp_path_factory.mktemp("student")
    make_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(make_llama, tokenizer):
    return make_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id).eval()


def test_accuracies_are_shares_of_right_responses(model, tokenizer):
    asked = problems(20)
    decoding = Decoding(6, 1.0)
    prompts = encode_prompts(tokenizer, asked)
    sampled = generate_responses(model, tokenizer, prompts, decoding, num_samples=3).texts
    greedy = [text for [text] in generate_responses(model, tokenizer, prompts, Decoding(6)).texts]
    # A response of an even number of characters is right, an empty one undecided.
    verdicts = {True: 1, False: 0, None: 0}

    def compare(response, reference):
        return (len(response) % 2 == 0) if response else None

    found = evaluate(model, tokenizer, asked, decoding, num_samples=3, compare=compare, quiet=True)
    shares = [sum(verdicts[compare(t, "")] for t in texts) / 3 for texts in sampled]
    assert 0 < sum(shares) < 20
    assert found.average.mean == pytest.approx(sum(shares) / 20)
    assert found.greedy.mean == pytest.approx(sum(verdicts[compare(t, "")] for t in greedy) / 20)
    assert [[r.text for r in a.samples] for a in found.answered] == sampled
    assert [a.greedy.text for a in found.answered] == greedy
    assert [a.problem for a in found.answered] == asked
    assert found.num_undecided == sum(not t for texts in (*sampled, greedy) for t in texts)
    assert found.num_samples == 3 and found.num_tokens > 0 and found.seconds > 0


def test_answers_are_compared_with_the_reference(model, tokenizer):
    """A problem whose greedy response ends in a word has that word for its answer; of the others no answer is right."""
    asked = problems(20)
    texts = [t for [t] in generate_responses(model, tokenizer, encode_prompts(tokenizer, asked), Decoding(6)).texts]
    ends_in_word = [bool(text.split()) and text.split()[-1].isalpha() for text in texts]
    assert 0 < sum(ends_in_word) < len(asked)
    known = [
        Problem(p.messages, text.split()[-1] if ends else "nothing of the kind")
        for p, text, ends in zip(asked, texts, ends_in_word, strict=True)
    ]
    found = evaluate(model, tokenizer, known, Decoding(6, 1.0), num_samples=1, quiet=True)
    assert [a.greedy.right for a in found.answered] == ends_in_word


def test_errors_are_those_of_the_mean_over_problems():
    shares = [0.25, 0.5, 1.0, 0.25]
    found = Accuracy.over(shares, 4)
    variance = sum((x - 0.5) ** 2 for x in shares) / 3
    assert found.mean == 0.5
    assert found.standard_error == pytest.approx(math.sqrt(variance / 4))
    assert Accuracy.over([1.0]).standard_error is None


def wilson_by_roots(share, n):
    """The two p with |share - p| = 1.96 sqrt(p (1 - p) / n), as roots of a quadratic."""
    a, b, c = 1 + 1.96**2 / n, -(2 * share + 1.96**2 / n), share**2
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize(("right", "wrong"), [(30, 70), (1, 9), (99, 1)])
def test_intervals_of_single_answers_are_wilsons(right, wrong):
    found = Accuracy.over([1.0] * right + [0.0] * wrong)
    n = right + wrong
    # The variance of the sample divides by n - 1, so the effective number is that.
    assert found.confidence_95 == pytest.approx(wilson_by_roots(right / n, n - 1), abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_intervals_at_the_ends_have_a_width(share):
    low, high = Accuracy.over([share] * 20, 16).confidence_95
    expected = wilson_by_roots(share, 20)
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert high - low == pytest.approx(1.96**2 / (20 + 1.96**2))


def test_intervals_shrink_with_samples_only_where_problems_agree():
    """Equal shares: all samples are independent. Problems always right or always wrong: samples add nothing."""
    equal = Accuracy.over([0.5] * 25, 4)
    assert equal.confidence_95 == pytest.approx(wilson_by_roots(0.5, 100), abs=1e-9)
    split = [Accuracy.over([1.0] * 12 + [0.0] * 12, n).confidence_95 for n in (1, 16)]
    assert split[0] == split[1] == pytest.approx(wilson_by_roots(0.5, 23), abs=1e-9)


def test_intervals_cover_the_truth_at_about_their_rate():
    """Problems of differing difficulty, 4 samples each, 400 times: of 95% the share is within 4 standard errors."""
    rng, covered = random.Random(0), 0
    for _ in range(400):
        chances = [rng.betavariate(0.6, 1.4) for _ in range(60)]
        shares = [sum(rng.random() < p for _ in range(4)) / 4 for p in chances]
        low, high = Accuracy.over(shares, 4).confidence_95
        covered += low <= 0.3 <= high
    assert covered / 400 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 400))


def test_too_few_samples_are_refused(model, tokenizer):
    with pytest.raises(InputError, match=r"--samples must be at least 1, got 0"):
        evaluate(model, tokenizer, problems(), Decoding(1, 1.0), num_samples=0, quiet=True)


def test_a_checkpoint_is_loaded_in_the_dtype_that_is_asked_for(student):
    model, tokenizer = load_model(str(student))
    assert model.dtype == torch.float32 and tokenizer.eos_token == "<eos>"
    assert load_model(str(student), dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_loaded_with_their_base(student, tokenizer, tmp_path, dtype):
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    ids = torch.arange(8)[None]
    plain = base(input_ids=ids).logits
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    expected = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    model, loaded = load_model(str(tmp_path), dtype=dtype)
    with torch.inference_mode():
        found = model.eval()(input_ids=ids).logits.float()
    assert (found - expected).norm() <= {"float32": 1e-5, "bfloat16": 0.05}[dtype] * expected.norm()
    assert (plain - expected).norm() > 0.1 * expected.norm()
    evaluation = evaluate(model, loaded, problems(2), Decoding(3, 1.0), num_samples=2, quiet=True)
    assert [len(a.samples) for a in evaluation.answered] == [2, 2]


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="nobody: no such folder"):
        load_model(str(tmp_path / "nobody"))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "./gone"}')
    with pytest.raises(InputError, match="cannot load a causal language model"):
        load_model(str(tmp_path))
