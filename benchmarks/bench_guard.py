"""Does the guard keep its word? Varied conversations saved by `auto` with an English profile.

Each conversation is read, saved with the default settings, opened again, and its next 128 tokens
are scored over what came back against the exact K/V. The guard promises its limit for the tokens
that it runs; how often the next ones keep it, too, is measured. Texts like those of the profile,
code, other languages and scripts, numbers, random tokens and a single token over and over.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

import krul
from krul.demo_model import load

from . import bench_quality, harness, texts

N_CONVERSATIONS = 100
N_SCORED = 128
LENGTHS = (384, 640, 1024, 1536)
COLUMNS = [
    ("kind", "conversations", ""),
    ("n", "n", "d"),
    ("ratio_bf16", "x smaller than bf16", ".2f"),
    ("guard_kl", "guard's mean KL, worst", ".4f"),
    ("next_kl", "next tokens' mean KL, mean", ".4f"),
    ("next_kl_worst", "worst", ".4f"),
    ("n_kept", "within the limit", "d"),
    ("codecs", "codecs", ""),
]

# ruff: noqa: RUF001 - other scripts look like Latin letters to a linter
# A few sentences each, shuffled and repeated with numbers to fill a conversation.
_LANGUAGES = {
    "German": [
        "Der Zug nach Hamburg hat heute zwanzig Minuten Verspätung.",
        "Meine Großmutter backt jeden Sonntag einen Apfelkuchen mit Zimt.",
        "Im Keller steht ein altes Fahrrad, das niemand mehr benutzt.",
        "Wer zuletzt das Haus verlässt, schließt bitte die Fenster.",
    ],
    "French": [
        "Le marché ouvre à huit heures et ferme avant midi.",
        "Elle a oublié ses clés sur la table de la cuisine.",
        "Nous irons à la mer dès que l'école sera finie.",
        "Il pleut depuis trois jours et la rivière monte.",
    ],
    "Spanish": [
        "La biblioteca cierra los lunes por la tarde.",
        "Mi hermano estudia física en una ciudad pequeña.",
        "El perro duerme debajo de la mesa cuando llueve.",
        "Mañana compraremos pan, queso y un kilo de tomates.",
    ],
    "Chinese": [
        "今天的天气很好，我们去公园散步。",
        "她每天早上七点起床，然后喝一杯茶。",
        "这本书讲的是一个渔夫的故事。",
    ],
    "Russian": [
        "Завтра утром мы поедем на дачу и будем сажать картошку.",
        "Он забыл закрыть окно, и в комнате стало холодно.",
        "Библиотека находится рядом с вокзалом.",
    ],
    "emoji": ["🙂🚀🌍 ok 👍👍", "🍎🍌🍇 = fruit 🧺", "⚠️ stop 🛑 then go ✅", "🐈‍⬛🐕🦜 pets 💤"],
}


def conversations(tokenizer: Any, n: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Make conversations of some kinds in turn, each with its 128 next tokens."""
    draw = random.Random(5)
    long = {
        kind: tokenizer(words[:150_000], return_tensors="pt").input_ids[0]
        for kind, words in texts.held_out_texts().items()
    }
    kinds = [*long, *_LANGUAGES, *long, "numbers", *long, "random tokens", "one token"]
    for number in range(n):
        kind = kinds[number % len(kinds)]
        n_tokens = draw.choice(LENGTHS) + N_SCORED
        if kind in long:
            start = draw.randrange(len(long[kind]) - n_tokens)
            ids = long[kind][start : start + n_tokens]
        elif kind == "random tokens":
            ids = torch.tensor([draw.randrange(1000, 49_000) for _ in range(n_tokens)])
        elif kind == "one token":
            ids = torch.full((n_tokens,), draw.randrange(1000, 49_000))
        else:
            sentences = []
            for line in range(n_tokens):  # more than enough
                if kind == "numbers":
                    sentences.append(f"{draw.random():.6f}, {draw.randrange(10**9)}")
                else:
                    sentences.append(f"{draw.choice(_LANGUAGES[kind])} {line}")
            ids = tokenizer("\n".join(sentences), return_tensors="pt").input_ids[0, :n_tokens]
        yield kind, ids[None]


@torch.no_grad()
def measure(
    model: Any, store: krul.Store, name: str, kind: str, ids: torch.Tensor
) -> dict[str, Any]:
    """Save a conversation, open it again and score what follows."""
    n_tokens = ids.shape[1] - N_SCORED
    with store.open(name, model) as cache:
        model(ids[:, :n_tokens], past_key_values=cache, logits_to_keep=1)
        report = cache.save()
        exact = model(ids[:, n_tokens:], past_key_values=cache).logits[0].log_softmax(-1)
    with store.open(name, model) as cache:
        harness.check(cache.n_tokens == n_tokens, f"{name} lost tokens")
        got = model(ids[:, n_tokens:], past_key_values=cache).logits[0].log_softmax(-1)
    store.delete(name)
    return {
        "kind": kind,
        "n_tokens": n_tokens,
        "ratio_bf16": report.ratio_bf16,
        "guard_kl": report.guard_mean_kl,
        "next_kl": float((exact.exp() * (exact - got)).sum(-1).mean().clamp_min(0)),
        "codec": "/".join(sorted(set(report.codec_by_layer))),
        "reason": report.reason,
    }


def main() -> None:
    options = harness.parser(__doc__.splitlines()[0]).parse_args()
    n = 12 if options.quick else N_CONVERSATIONS
    tokenizer, model = load(torch.float32)
    limit = krul.Settings().max_kl
    details = []
    with tempfile.TemporaryDirectory() as folder, krul.Store(folder) as store:
        store.add_profile(bench_quality.fitted_profile(model, tokenizer))
        for number, (kind, ids) in enumerate(conversations(tokenizer, n)):
            details.append(measure(model, store, f"chat {number}", kind, ids))
            print(number, details[-1], file=sys.stderr)
            harness.check(details[-1]["guard_kl"] <= limit, f"{kind}: the guard let more pass")
    rows = []
    for kind in [*dict.fromkeys(row["kind"] for row in details), "all"]:
        mine = [row for row in details if kind in (row["kind"], "all")]
        rows.append(
            {
                "kind": kind,
                "n": len(mine),
                "ratio_bf16": len(mine) / sum(1 / row["ratio_bf16"] for row in mine),
                "guard_kl": max(row["guard_kl"] for row in mine),
                "next_kl": sum(row["next_kl"] for row in mine) / len(mine),
                "next_kl_worst": max(row["next_kl"] for row in mine),
                "n_kept": sum(row["next_kl"] <= limit for row in mine),
                "codecs": ", ".join(sorted({row["codec"] for row in mine})),
            }
        )
    notes = [" ".join(__doc__.split("\n\n")[1].split())]
    harness.finish(
        "guard",
        rows,
        COLUMNS,
        notes=notes,
        is_quick=options.quick,
        path=options.json,
        details=details,
    )


if __name__ == "__main__":
    main()
