"""The demo's tokenizer and checkpoints, read back the way any other command reads them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache_train.demo import models, task

SHORT = models.Pretraining(task.TEACHER, seed=11, num_steps=3, batch_size=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "teacher"
    models.pretrain(SHORT, folder)
    return folder


def test_tokenizer_round_trip(checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for record in [*task.CORPUS.records(100, seed=1), *task.UNSEEN_STYLE_CORPUS.records(100, seed=1)]:
        ids = tokenizer(record["response"]).input_ids
        assert len(ids) == len(record["response"].split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == record["response"]


def test_newline_is_a_token_of_its_own(checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("a 3 b + 5 ?\nanswer 1").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "3", "b", "+", "5", "?", "\n", "answer", "1"]


def test_special_tokens(checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert config.vocab_size == len(tokenizer)


def test_labels_are_the_response_and_its_eos() -> None:
    tokenizer = models.build_tokenizer()
    records = [
        {"prompt": "a 1 b + 2 ?", "response": "answer 3"},
        {"prompt": "a 1 b + 2 c * 2 ?", "response": "the answer is 6"},
    ]
    ids_BL, labels_BL = models.encode(tokenizer, records)
    assert tokenizer.convert_ids_to_tokens(ids_BL[0, :10]) == [*"a1b+2?\n", "answer", "3", "<eos>"]
    assert (ids_BL[0, 10:] == tokenizer.pad_token_id).all()
    for row, (start, end) in enumerate([(7, 10), (10, 15)]):
        expected = torch.full_like(labels_BL[row], models.IGNORE_INDEX)
        expected[start:end] = ids_BL[row, start:end]
        assert torch.equal(labels_BL[row], expected)


def test_size() -> None:
    model = models.build_model(models.build_tokenizer(), seed=0)
    assert 0.22e6 < model.num_parameters() < 0.24e6


def test_pretraining_is_deterministic_and_learns(checkpoint, tmp_path) -> None:
    again = models.pretrain(SHORT, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    longer = models.pretrain(models.Pretraining(task.TEACHER, seed=11, num_steps=40, batch_size=8), tmp_path / "longer")
    assert longer.num_parameters == again.num_parameters
    assert longer.loss < again.loss - 1.0


def test_processes_change_nothing(checkpoint, tmp_path) -> None:
    other = models.Pretraining(task.BASE, seed=12, num_steps=2, batch_size=4)
    outputs = [tmp_path / "teacher", tmp_path / "base"]
    made = models.pretrain_in_parallel([SHORT, other], outputs)
    assert made[0].num_parameters == made[1].num_parameters
    assert (outputs[0] / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert (outputs[1] / "model.safetensors").read_bytes() != (checkpoint / "model.safetensors").read_bytes()


def test_rate_warms_up_and_ends_at_its_final_fraction() -> None:
    config = models.Pretraining(task.BASE, seed=0, num_steps=100, learning_rate=1.0, warmup_steps=10)
    assert config.rate(0) == pytest.approx(0.1)
    assert config.rate(10) > config.rate(50) > config.rate(99)
    assert config.rate(100) == pytest.approx(0.1)
