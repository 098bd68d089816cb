"""Questions whose answer stands in the history: a hidden code, a table of keys, a line to repeat.

The answer is begun for the model, so that a right one starts at once. Then "the greedy answer is
exact" and "at each token of the answer the most probable token is the right one" are the same
thing, and one pass over question and answer decides it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TASKS = ("needle", "keys", "copy")
NEEDLE_TOKENS = (1024, 1536, 2048, 3072, 4096)
OTHER_TOKENS = (1024, 1536, 2048)
N_KEYS = 20

_PLACES = re.findall(
    r"\w+",
    "Lisbon Bergen Quito Osaka Dakar Turin Perth Cusco Leeds Basel Accra Sofia Tunis Hanoi Malmo "
    "Bogota Cairo Delft Esbjerg Fargo Genoa Havana Izmir Jaffa Kyoto Lagos Milan Natal Oslo Paris",
)
_WORDS = re.findall(
    r"\w+",
    "amber basin candle dragon ember falcon garden harbor island jacket kettle ladder marble "
    "needle orange pepper quartz ribbon silver timber velvet walnut yellow anchor bridge copper "
    "desert engine forest ginger hammer insect jungle lantern meadow napkin oyster pencil rocket "
    "saddle temple violin window basket cotton dinner flower guitar helmet ladle mirror parcel",
)


@dataclass(frozen=True)
class Trial:
    """Token ids: what is kept, what is asked afterwards, and what must come then."""

    task: str
    number: int
    history: list[int]
    question: list[int]
    answer: list[int]


def _chat(system: str = "You are a helpful assistant.") -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


def _ask(question: str, begun: str) -> str:
    return f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n{begun}"


def make(task: str, number: int, encode: Callable[[str], list[int]], haystack: list[int]) -> Trial:
    """Make one trial; the same numbers always make the same one.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    number : int
        Which trial: seeds it, and goes through the lengths in turn.
    encode : callable
        Turns words into token ids, adding none.
    haystack : list of int
        Token ids of text that has nothing to do with it, longer than the longest history.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r} but must be one of {', '.join(TASKS)}")
    draw = random.Random(f"{task} {number}")
    lengths = NEEDLE_TOKENS if task == "needle" else OTHER_TOKENS
    n_tokens = lengths[number % len(lengths)]
    make_one: dict[str, Callable[..., Trial]] = {"needle": _needle, "keys": _keys, "copy": _copy}
    return make_one[task](number, n_tokens, draw, encode, haystack)


def _digits(draw: random.Random, n: int) -> str:
    return str(draw.randrange(10 ** (n - 1), 10**n))


def _around(
    words: str, n_tokens: int, draw: random.Random, encode: Any, haystack: list[int]
) -> list[int]:
    """Hide `words` in so much of the haystack that there are `n_tokens` tokens."""
    begin, hidden = encode(_chat("Read the text and remember it.")), encode(words)
    n = n_tokens - len(begin) - len(hidden)
    if n < 1 or n >= len(haystack):
        raise ValueError(f"haystack has {len(haystack)} tokens but more than {n} are needed")
    start = draw.randrange(len(haystack) - n)
    at = draw.randrange(n // 10, n - n // 10)
    text = haystack[start : start + n]
    return begin + text[:at] + hidden + text[at:]


def _needle(
    number: int, n_tokens: int, draw: random.Random, encode: Any, haystack: list[int]
) -> Trial:
    place, code = draw.choice(_PLACES), _digits(draw, 5)
    history = _around(
        f"\n\nThe secret code of {place} is {code}. Remember it.\n\n",
        n_tokens,
        draw,
        encode,
        haystack,
    )
    question = _ask(f"What is the secret code of {place}?", f"The secret code of {place} is")
    return Trial("needle", number, history, encode(question), encode(f" {code}"))


def _keys(
    number: int, n_tokens: int, draw: random.Random, encode: Any, haystack: list[int]
) -> Trial:
    table = {key: _digits(draw, 4) for key in draw.sample(_WORDS, N_KEYS)}
    lines = "".join(f"The value of {key} is {value}.\n" for key, value in table.items())
    history = _around(f"\n\n{lines}\n", n_tokens, draw, encode, haystack)
    key, value = draw.choice(list(table.items()))
    question = _ask(f"What is the value of {key}?", f"The value of {key} is")
    return Trial("keys", number, history, encode(question), encode(f" {value}"))


def _copy(
    number: int, n_tokens: int, draw: random.Random, encode: Any, haystack: list[int]
) -> Trial:
    words = draw.sample(_WORDS, 10)
    history = _around(
        f"\n\nThe line to repeat: {' '.join(words)}.\n\n", n_tokens, draw, encode, haystack
    )
    question = _ask("Repeat the line that you were told to repeat.", "The line to repeat:")
    question += f" {' '.join(words[:2])}"
    return Trial("copy", number, history, encode(question), encode(f" {' '.join(words[2:])}"))
