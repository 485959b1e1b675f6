import subprocess
import sys

import numpy as np
import pytest

from logitcache_pipeline.engines.base import ScoringRequest, load_teacher
from logitcache_storage.errors import InputError


def request(ids, positions):
    return ScoringRequest(np.array(ids, dtype=np.int32), np.array(positions, dtype=np.int32))


def test_a_request_keeps_its_arrays():
    made = request([4, 5, 6], [1, 2])
    assert made.input_ids.tolist() == [4, 5, 6]
    assert made.target_positions.tolist() == [1, 2]


@pytest.mark.parametrize("positions", [[0, 1], [3], [-1]])
def test_a_target_that_nothing_predicts_is_refused(positions):
    with pytest.raises(InputError, match=r"between 1 and 2 in a sequence of 3 tokens, found"):
        request([4, 5, 6], positions)


@pytest.mark.parametrize(("ids", "positions"), [([], [1]), ([4, 5], []), ([[4, 5]], [1])])
def test_rows_of_integers_are_asked_for(ids, positions):
    with pytest.raises(InputError, match="must be a row of at least one integer, got int32 of shape"):
        request(ids, positions)


def test_fractions_are_no_token_ids():
    with pytest.raises(InputError, match="input_ids must be a row of at least one integer, got float64"):
        ScoringRequest(np.array([1.0, 2.0]), np.array([1], dtype=np.int32))


def test_an_unknown_engine_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown engine 'gguf'; choose from .*transformers"):
        load_teacher("gguf", "somewhere")


def test_an_unknown_option_of_an_engine_is_named():
    with pytest.raises(InputError, match=r"the engine transformers does not take these engine options: .*'colour'"):
        load_teacher("transformers", "somewhere", colour="red")


def test_the_protocol_imports_neither_torch_nor_transformers():
    code = "import sys, logitcache_pipeline.engines as e; print(not {'torch', 'transformers'} & set(sys.modules))"
    path = ["pipeline", "storage"]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "True"
