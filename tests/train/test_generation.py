"""Generation against plain loops over the model's own logits, and prompts token by token."""

import copy
import math
import random

import pytest
import torch

from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_train.answers import Problem
from logitcache_train.generation import Decoding, encode_prompts, generate_responses

WORDS = ["a", "3", "b", "+", "5", "c", "*", "2", "d", "-", "4"]


def problems(count=7, seed=0):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(count)]
    return [Problem(({"role": "user", "content": text},), "3") for text in texts]


@pytest.fixture
def model(make_llama, tokenizer):
    return make_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id).eval()


def greedy_by_hand(model, tokenizer, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_responses_in_padded_batches_are_those_of_each_prompt_alone(model, tokenizer, batch_size):
    prompts = encode_prompts(tokenizer, problems())
    found = generate_responses(model, tokenizer, prompts, Decoding(6, batch_size=batch_size))
    assert [texts[0] for texts in found.texts] == [greedy_by_hand(model, tokenizer, p, 6) for p in prompts]


@pytest.mark.parametrize("temperature", [0.8, 2.5])
def test_sampling_follows_the_models_own_distribution(model, tokenizer, temperature):
    """One token after one prompt, 4,000 times: the share of each token within five standard errors."""
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    prompts = encode_prompts(tokenizer, problems(1))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(prompts)).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    found = generate_responses(model, tokenizer, prompts, Decoding(1, temperature, 500), num_samples=4000)
    assert found.num_tokens == 4000
    checked = 0
    for token in expected.topk(8).indices.tolist():
        p, text = expected[token].item(), tokenizer.decode([token], skip_special_tokens=True)
        if text:
            share = sum(t == text for t in found.texts[0]) / 4000
            assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / 4000)
            checked += 1
    assert checked >= 6


def test_later_tokens_are_drawn_independently_of_earlier_ones(model, tokenizer):
    """Of two tokens drawn from one fixed distribution, the pairs; with one random number for both they would agree."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    prompts = encode_prompts(tokenizer, problems(1))
    found = generate_responses(model, tokenizer, prompts, Decoding(2, 1.0, 1000), num_samples=3000).texts[0]
    pairs = [text.split() for text in found]
    same = sum(len(pair) == 2 and pair[0] == pair[1] for pair in pairs) / len(pairs)
    p = 1 / len(tokenizer)
    assert abs(same - p) <= 5 * math.sqrt(p / len(pairs))


def test_a_cold_temperature_is_greedy(model, tokenizer):
    prompts = encode_prompts(tokenizer, problems())
    cold = generate_responses(model, tokenizer, prompts, Decoding(6, 1e-30))
    assert cold.texts == generate_responses(model, tokenizer, prompts, Decoding(6)).texts


def test_the_seed_decides_the_responses(model, tokenizer):
    prompts = encode_prompts(tokenizer, problems())

    def found(seed):
        return generate_responses(model, tokenizer, prompts, Decoding(5, 1.0, 8, seed), num_samples=3).texts

    assert found(1) == found(1)
    assert found(1) != found(2)
    assert [len(texts) for texts in found(1)] == [3] * 7
    assert all(len(set(texts)) > 1 for texts in found(1))


def test_neither_batches_nor_other_problems_nor_more_samples_change_a_response(model, tokenizer):
    model = model.double()
    prompts = encode_prompts(tokenizer, problems(9))

    def found(count, num_samples, batch_size):
        decoding = Decoding(8, 1.3, batch_size, seed=4)
        return generate_responses(model, tokenizer, prompts[:count], decoding, num_samples=num_samples).texts

    whole = found(9, 4, 64)
    assert found(9, 4, 1) == found(9, 4, 5) == whole
    assert found(3, 4, 64) == whole[:3]
    assert found(9, 2, 64) == [texts[:2] for texts in whole]


def test_generated_tokens_count_up_to_the_end_of_each_response(model, tokenizer):
    prompts = encode_prompts(tokenizer, problems(5))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # Of equal logits the first token is taken, padding, which ends nothing.
    found = generate_responses(model, tokenizer, prompts, Decoding(4))
    assert (found.num_tokens, found.num_cut) == (5 * 4, 5)
    # Of sampled ones about one in V is the end; counted here on the texts' own ids.
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), 2))
    found = generate_responses(model, tokenizer, prompts, Decoding(4, 1.0), num_samples=40)
    assert 5 * 40 < found.num_tokens < 5 * 40 * 4 and 0 < found.num_cut < 5 * 40
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    found = generate_responses(model, tokenizer, prompts, Decoding(4, 1.0), num_samples=40)
    assert (found.num_tokens, found.num_cut) == (5 * 40, 0)


def test_prompts_are_the_text_and_a_newline_after_what_the_tokenizer_puts_first(tokenizer):
    [ids] = encode_prompts(tokenizer, problems(1)[:1])
    assert ids == tokenizer(problems(1)[0].prompt + "\n", add_special_tokens=False)["input_ids"]


class BosTokenizer:
    """Puts a 1 before every text and a 2 behind it."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens=add_special_tokens)["input_ids"] for t in text]}
        ids = [10 + ord(c) % 50 for c in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_a_prefix_of_the_tokenizer_is_kept_and_its_suffix_is_not():
    [ids] = encode_prompts(BosTokenizer(), [Problem(({"role": "user", "content": "a"},), "")])
    assert ids == [1, 10 + ord("a") % 50, 10 + ord("\n") % 50]


def test_a_chat_template_makes_the_prompt(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} ? {% endfor %}{% if add_generation_prompt %}is {% endif %}"
    )
    [ids] = encode_prompts(tokenizer, [Problem(({"role": "user", "content": "a 3"},), "")])
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "3", "?", "is"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 1, "seed": -1}, "seed must be at least 0, got -1"),
        ({"max_new_tokens": 1, "temperature": 0.0}, r"temperature must be above 0, got 0.0"),
        ({"max_new_tokens": 1, "temperature": math.nan}, r"temperature must be above 0, got nan"),
    ],
)
def test_decoding_out_of_range_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Decoding(**arguments)


def test_prompts_without_room_or_tokens_are_refused(model, tokenizer):
    with pytest.raises(InputError, match="the prompt of problem 1 has 70 tokens, and the model reads 64"):
        generate_responses(model, tokenizer, [[5] * 70], Decoding(1))
    with pytest.raises(InputError, match=r"a prompt has no tokens"):
        generate_responses(model, tokenizer, [[5], []], Decoding(1))


def test_a_response_ends_where_the_model_reads_no_further(model, tokenizer):
    found = generate_responses(model, tokenizer, [[5] * 62], Decoding(10, 1.0))
    assert found.num_tokens <= 2 and len(found.texts[0]) == 1


def test_logits_that_are_no_numbers_are_an_error_and_no_answer(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(LogitCacheError, match="logits are NaN or infinite"):
        generate_responses(model, tokenizer, [[5, 6]], Decoding(2, 1.0))
