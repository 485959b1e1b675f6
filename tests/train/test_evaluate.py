"""Generation against plain loops over the model's own logits, and accuracies against counting by hand."""

import copy
import json
import math
import random

import pytest
import torch

from logitcache_storage.cli import main
from logitcache_storage.errors import InputError
from logitcache_train.answers import Problem
from logitcache_train.evaluate import Accuracy, evaluate
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
    found, _ = generate_responses(model, tokenizer, prompts, Decoding(6, batch_size=batch_size))
    assert [texts[0] for texts in found] == [greedy_by_hand(model, tokenizer, p, 6) for p in prompts]


def test_sampling_follows_the_models_own_distribution(model, tokenizer):
    """One token after one prompt, 4,000 times: the share of each token within five standard errors."""
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    prompts = encode_prompts(tokenizer, problems(1))
    temperature = 0.8
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(prompts)).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    found, num_tokens = generate_responses(model, tokenizer, prompts, Decoding(1, temperature, 500), num_samples=4000)
    assert num_tokens == 4000
    for token in expected.topk(8).indices.tolist():
        p, text = expected[token].item(), tokenizer.decode([token], skip_special_tokens=True)
        if text:
            share = sum(t == text for t in found[0]) / 4000
            assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / 4000)


def test_the_seed_decides_the_responses(model, tokenizer):
    prompts = encode_prompts(tokenizer, problems())

    def found(seed):
        return generate_responses(model, tokenizer, prompts, Decoding(5, 1.0, 8, seed), num_samples=3)[0]

    assert found(1) == found(1)
    assert found(1) != found(2)
    assert [len(texts) for texts in found(1)] == [3] * 7


def test_generated_tokens_count_up_to_the_end_of_each_response(model, tokenizer):
    prompts = encode_prompts(tokenizer, problems(5))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    _, num_tokens = generate_responses(model, tokenizer, prompts, Decoding(4))
    # Of equal logits the first token is taken, padding, which ends nothing.
    assert num_tokens == 5 * 4


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


def test_accuracies_are_shares_of_right_responses(model, tokenizer):
    asked = problems(20)
    prompts = encode_prompts(tokenizer, asked)
    expected = [greedy_by_hand(model, tokenizer, p, 6) for p in prompts]
    # A problem whose greedy response ends in a word has that word for its answer; of the others no answer is right.
    ends_in_word = [text.split()[-1:] and text.split()[-1].isalpha() for text in expected]
    known = [
        Problem(p.messages, text.split()[-1] if ends else "nothing of the kind")
        for p, text, ends in zip(asked, expected, ends_in_word, strict=True)
    ]
    assert 0 < sum(map(bool, ends_in_word)) < len(asked)
    found = evaluate(model, tokenizer, known, Decoding(6, 1.0), num_samples=2, quiet=True)
    assert found.greedy.mean == pytest.approx(sum(map(bool, ends_in_word)) / len(asked))
    assert (found.num_problems, found.num_samples) == (len(asked), 2)
    assert 0 <= found.average.mean <= 1 and found.num_tokens > 0


def test_errors_and_intervals():
    found = Accuracy.over([0.25, 0.5, 1.0, 0.25])
    variance = sum((x - 0.5) ** 2 for x in (0.25, 0.5, 1.0, 0.25)) / 3
    assert found.mean == 0.5
    assert found.standard_error == pytest.approx(math.sqrt(variance / 4))
    assert found.confidence_95 == pytest.approx(
        (0.5 - 1.96 * math.sqrt(variance / 4), 0.5 + 1.96 * math.sqrt(variance / 4))
    )
    assert Accuracy.over([1.0, 1.0, 0.9]).confidence_95[1] == 1.0
    assert math.isnan(Accuracy.over([1.0]).standard_error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 1, "temperature": 0.0}, r"temperature must be above 0, got 0.0"),
    ],
)
def test_decoding_out_of_range_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Decoding(**arguments)


def test_prompts_without_room_and_too_few_samples_are_refused(model, tokenizer):
    with pytest.raises(InputError, match="the prompt of problem 1 has 70 tokens, and the model reads 64"):
        generate_responses(model, tokenizer, [[5] * 70], Decoding(1))
    with pytest.raises(InputError, match=r"a prompt has no tokens"):
        generate_responses(model, tokenizer, [[5], []], Decoding(1))
    with pytest.raises(InputError, match=r"--samples must be at least 1, got 0"):
        evaluate(model, tokenizer, problems(), Decoding(1, 1.0), num_samples=0, quiet=True)


def test_a_response_ends_where_the_model_reads_no_further(model, tokenizer):
    responses, num_tokens = generate_responses(model, tokenizer, [[5] * 62], Decoding(10))
    assert num_tokens <= 2 and len(responses[0]) == 1


def test_the_command_prints_a_table_or_json(made, tmp_path, capsys):
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in problems(4)))
    words = ["evaluate", "--model", str(made.student), "--data", str(data), "--samples", "3", "--max-new-tokens", "4"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_problems"] == 4 and found["num_samples"] == 3
    assert found["confidence_95"][0] <= found["average"] <= found["confidence_95"][1]
    assert {"standard_error", "greedy", "greedy_standard_error", "seconds", "generated_tokens"} <= found.keys()
    assert main([*words, "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Average@3" in shown and "2 of" in shown
    assert main([*words, "--limit", "0"]) == 2
    assert "--limit must be at least 1" in capsys.readouterr().err
    assert main([*words[:2], str(tmp_path / "nobody"), *words[3:]]) == 2
    assert "nobody: no such folder" in capsys.readouterr().err
