"""Every workable family: a conversation is saved, its process killed, and it goes on unharmed.

Three processes take three turns of each conversation. The first also runs all turns without any
interruption, in transformers' own cache, and writes down the logits; then it saves after its turn
and is killed. The second opens the store in a new process, takes the second turn, saves what is new
and is killed, and the third takes the third. The logits of every generated token must be equal bit
for bit.

One process serves all families, because most of the time goes into its start.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
import torch

N_NEW = 4
TURNS = (30, 7, 9)


@dataclass(frozen=True)
class Case:
    """One conversation: a family, and how it is run."""

    family: str
    form: str = ""
    dtype: str = "float32"
    attention: str | None = None
    n_batch: int = 1
    n_padding: int = 0

    @property
    def name(self) -> str:
        """The id of the test and of the conversation."""
        return f"{self.family}-{self.form}" if self.form else self.family


CASES = {
    case.name: case
    for case in [
        *[Case(family) for family in models.workable()],
        *[
            Case(family, "bfloat16", dtype="bfloat16")
            for family in ("llama", "gemma3", "gpt2", "mixtral")
        ],
        *[
            Case(family, "eager", attention="eager")
            for family in ("llama", "mistral", "gemma2", "gpt_neox", "gpt_oss")
        ],
        *[Case(family, "batch", n_batch=3) for family in ("qwen2", "mistral", "gpt2")],
        *[
            Case(family, "left-padded", n_batch=2, n_padding=5)
            for family in ("llama", "qwen3", "mistral", "gemma3", "gpt2")
        ],
    ]
}


# ---- in the child processes ----------------------------------------------------------------------


def build(case):
    model = models.tiny(
        case.family, dtype=getattr(torch, case.dtype), attn_implementation=case.attention
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def turn_of(case, index):
    """Return the tokens that the user adds in turn `index`, and the mask of these."""
    seed = 100 * index + len(case.family)
    ids = models.token_ids(seed, TURNS[index], case.n_batch)
    mask = torch.ones_like(ids)
    if index == 0 and case.n_padding:
        ids[0, : case.n_padding] = 0
        mask[0, : case.n_padding] = 0
    return ids, mask


def take_turn(model, case, index, history, mask, cache):
    """Feed turn `index` after `history` and generate; return ids, mask and new logits."""
    ids, new_mask = turn_of(case, index)
    ids = torch.cat([history, ids], dim=1)
    mask = torch.cat([mask, new_mask], dim=1)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=N_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    mask = torch.cat([mask, mask.new_ones(case.n_batch, N_NEW)], dim=1)
    return out.sequences, mask, torch.stack(out.logits)


def nothing(case):
    return torch.zeros(2, case.n_batch, 0, dtype=torch.long)


def run_uninterrupted(model, case, folder):
    from transformers import DynamicCache

    from krul.model import text_config

    cache = DynamicCache(config=text_config(model))
    history, mask = nothing(case)
    for index in range(len(TURNS)):
        history, mask, logits = take_turn(model, case, index, history, mask, cache)
        keep(folder, case, index, "expected", history, mask, logits)


def keep(folder, case, index, kind, history, mask, logits):
    torch.save((history, mask, logits), folder / f"{case.name}.{index}.{kind}")


def load(folder, case, index, kind):
    return torch.load(folder / f"{case.name}.{index}.{kind}", weights_only=True)


def run_phase(case, index, folder):
    import krul

    model = build(case)
    if index == 0:
        run_uninterrupted(model, case, folder)
        history, mask = nothing(case)
    else:
        history, mask, _ = load(folder, case, index - 1, "expected")
    store = krul.Store(folder / "store")
    cache = store.open(case.name, model, settings=krul.Settings(codec="exact"))
    n_restored = int(cache.get_seq_length())
    history, mask, logits = take_turn(model, case, index, history, mask, cache)
    keep(folder, case, index, "found", history, mask, logits)
    report = cache.save()
    return {
        "n_restored": n_restored,
        "n_tokens": report.n_tokens,
        "n_new_tokens": report.n_new_tokens,
        "codecs": sorted(set(report.codec_by_layer)),
        "plan": cache.restore_report.plan,
        "reason": cache.restore_report.reason,
    }


def child(index, folder):
    torch.set_num_threads(1)
    for case in CASES.values():
        try:
            result = run_phase(case, index, folder)
        except Exception:
            result = {"error": traceback.format_exc()}
        (folder / f"{case.name}.{index}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)  # no close, no flush, no atexit


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Run the three processes, each to its death, and return the folder with what they found."""
    folder = tmp_path_factory.mktemp("families")
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parent), str(here.parent.parent), *filter(None, sys.path)])
    for index in range(len(TURNS)):
        done = subprocess.run(
            [sys.executable, str(here), str(index), str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == -signal.SIGKILL, f"process {index} ended itself:\n{done.stderr}"
    return folder


@pytest.mark.parametrize("name", CASES)
def test_next_turn_is_bit_equal_in_a_new_process(name, conversations):
    case = CASES[name]
    n_before = 0
    for index in range(len(TURNS)):
        result = json.loads((conversations / f"{name}.{index}.json").read_text())
        assert "error" not in result, f"turn {index}:\n{result['error']}"
        assert result["n_restored"] == n_before, f"turn {index} started from another length"
        # The last generated token has no K and V yet.
        n_total = n_before + TURNS[index] + N_NEW - (1 if index == 0 else 0)
        assert result["n_tokens"] == n_total
        assert result["n_new_tokens"] == n_total - n_before
        assert set(result["codecs"]) <= {"exact", "none"}
        assert result["plan"] == ("empty" if index == 0 else "load"), result["reason"]
        n_before = n_total

        expected, _, expected_logits = load(conversations, case, index, "expected")
        found, _, found_logits = load(conversations, case, index, "found")
        assert torch.equal(found, expected), f"turn {index} says something else"
        assert found_logits.dtype == expected_logits.dtype
        assert torch.equal(found_logits, expected_logits), (
            f"turn {index}: logits differ by up to "
            f"{float((found_logits - expected_logits).abs().max()):.1e}"
        )


if __name__ == "__main__":
    child(int(sys.argv[1]), Path(sys.argv[2]))
