"""Arguments that the Trainer would stumble over are refused by name; those that it can work with are not."""

import pytest
from transformers import TrainingArguments

from logitcache_storage.errors import InputError
from logitcache_train.argument_checks import check_arguments


def check(folder, **given):
    check_arguments(TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": -1.0}, "--learning_rate -1.0: expected at least 0, and finite"),
        ({"learning_rate": float("nan")}, "--learning_rate nan: expected at least 0, and finite"),
        ({"learning_rate": float("inf")}, "--learning_rate inf: expected at least 0, and finite"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1: expected at least 0"),
        ({"adam_beta1": 1.5}, "--adam_beta1 1.5: expected at least 0, and below 1"),
        ({"adam_beta2": 1.0}, "--adam_beta2 1.0: expected at least 0, and below 1"),
        ({"adam_epsilon": -1e-8}, "--adam_epsilon -1e-08: expected at least 0"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0: expected at least 1"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: expected at least 1"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1: expected at least 0"),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "--dataloader_prefetch_factor 0: expected at"),
        ({"max_steps": 0}, "--max_steps 0: expected at least 1, or -1 for --num_train_epochs"),
        ({"max_steps": -5}, "--max_steps -5: expected at least 1, or -1"),
        ({"num_train_epochs": 0.0}, "--num_train_epochs 0.0: expected a number above 0"),
        ({"optim": "galore_adamw"}, "--optim galore_adamw: You need to install `galore_torch`"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "--lr_scheduler_type cosine_with_min_lr with .* None: One of min_lr",
        ),
        (
            {"lr_scheduler_kwargs": {"low": 1}},
            "--lr_scheduler_type linear with .*: .* unexpected keyword argument 'low'",
        ),
    ],
)
def test_what_cannot_train_is_refused_by_name(tmp_path, given, message):
    with pytest.raises(InputError, match=rf"^{message}"):
        check(tmp_path, **given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"learning_rate": 0.0, "adam_beta1": 0.0, "max_steps": 1, "num_train_epochs": 0.0},
        {"num_train_epochs": 0.1},
        {"optim": "adafactor"},
        {"optim": "sgd", "lr_scheduler_type": "polynomial"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 100}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "max_steps": 7},
    ],
    ids=str,
)
def test_what_can_train_is_not(tmp_path, given):
    check(tmp_path, **given)
