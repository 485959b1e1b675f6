"""Arguments of the Trainer that it would take and stumble over once the student is loaded, or after the first step."""

from __future__ import annotations

import math

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from logitcache_storage.errors import InputError

RANGES = {
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
}
"""Least value, and what it must stay below."""


def check_arguments(arguments: TrainingArguments) -> None:
    """Refuse values out of range, and an optimizer or a schedule that cannot be made.

    Raises:
        InputError: names the argument.
    """
    for name, (low, high) in RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value < high:
            expected = f"at least {low}, and finite" if high == math.inf else f"at least {low}, and below {high}"
            raise InputError(f"--{name} {value}: expected {expected}")
    if arguments.max_steps < 1:
        if arguments.max_steps != -1:
            raise InputError(f"--max_steps {arguments.max_steps}: expected at least 1, or -1 for --num_train_epochs")
        if not 0 < arguments.num_train_epochs < math.inf:
            raise InputError(f"--num_train_epochs {arguments.num_train_epochs}: expected a number above 0")
    _try_optimizer(arguments)


def _try_optimizer(arguments: TrainingArguments) -> None:
    """Make optimizer and schedule for a single number."""
    number = torch.nn.Parameter(torch.zeros(1))
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = cls([number], **options)
    except ImportError as e:
        raise InputError(f"--optim {arguments.optim.value}: {e}") from e
    except (ValueError, TypeError):
        # Some are made of the whole student only, and the Trainer says what they lack.
        optimizer = torch.optim.SGD([number])
    schedule, given = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    try:
        get_scheduler(
            schedule, optimizer, num_warmup_steps=0, num_training_steps=10**6, scheduler_specific_kwargs=given
        )
    except (ValueError, TypeError) as e:
        raise InputError(f"--lr_scheduler_type {schedule.value} with --lr_scheduler_kwargs {given}: {e}") from e
