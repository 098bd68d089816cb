"""Real chats for the quality benchmark: given questions, answers sampled from the model itself.

Generating 3,200 tokens takes minutes, so each chat is kept in the user's cache, under a name that
changes with everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

SEED = 20260711
MAX_ANSWER_TOKENS = 320
TEMPERATURE = 0.7
TOP_P = 0.9

# What a user asks, topic by topic; when the questions are used up, the follow-ups go round.
TOPICS: dict[str, tuple[str, ...]] = {
    "bread": (
        "I would like to bake bread at home for the first time. Where do I start?",
        "What is the difference between yeast and sourdough?",
        "My dough did not rise. What may have gone wrong?",
        "Write down a full recipe for one loaf, with quantities.",
        "How should I store the bread so that it stays fresh?",
    ),
    "python": (
        "Explain what a generator is in Python, with an example.",
        "Write a function that reads a large file line by line and counts the words.",
        "How would I test that function?",
        "What changes if the file is compressed with gzip?",
        "Make it faster with several processes and explain what each part does.",
    ),
    "rome": (
        "Tell me how the Roman republic became an empire.",
        "Who was Augustus, and what did he change?",
        "How did ordinary people in Rome live at that time?",
        "Compare the Roman army before and after him.",
        "Which of these changes lasted longest, and why?",
    ),
    "story": (
        "Begin a story about a lighthouse keeper who finds a letter in a bottle.",
        "Continue: the letter is addressed to the keeper's grandmother.",
        "Let a storm come up in the night.",
        "Describe the person who arrives by boat the next morning.",
        "Tell the end of the story, and let the letter be explained.",
    ),
    "travel": (
        "I have ten days in Portugal in May and like walking and old towns. Plan the trip.",
        "Change the plan so that I need no car.",
        "What should I eat and drink on the way?",
        "Make a packing list for it.",
        "What will all of this cost, day by day?",
    ),
    "physics": (
        "Why is the sky blue, and why are sunsets red?",
        "Explain how a rainbow comes about.",
        "What would the sky look like on Mars?",
        "How does a telescope in space avoid these problems?",
        "Summarise all of this for a class of twelve-year-olds.",
    ),
}
FOLLOW_UPS = (
    "Can you give me a concrete example of that?",
    "Explain the last point in more detail.",
    "What do people most often get wrong about it?",
    "Put the whole conversation into a short list.",
    "What should I ask next? Ask it and answer it.",
)


def _ids(tokenizer: Any, words: str) -> list[int]:
    return tokenizer(words, add_special_tokens=False).input_ids


def generate(tokenizer: Any, model: Any, topic: str, n_tokens: int) -> list[int]:
    """Let the model answer until there are `n_tokens` tokens, and return the first of them all."""
    if topic not in TOPICS:
        raise ValueError(f"topic is {topic!r} but must be one of {', '.join(TOPICS)}")
    cache = transformers.DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(SEED + list(TOPICS).index(topic))
    end = _ids(tokenizer, "<|im_end|>")[0]
    ids: list[int] = _ids(tokenizer, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    turn = 0
    while len(ids) < n_tokens:
        questions = TOPICS[topic]
        question = (
            questions[turn]
            if turn < len(questions)
            else FOLLOW_UPS[(turn - len(questions)) % len(FOLLOW_UPS)]
        )
        ids += _ids(tokenizer, f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        for _ in range(MAX_ANSWER_TOKENS):
            with torch.no_grad():
                new = torch.tensor([ids[cache.get_seq_length() :]])
                out = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            p, order = (out.logits[0, -1] / TEMPERATURE).softmax(-1).sort(descending=True)
            p = p.where(p.cumsum(0) - p < TOP_P, 0)
            ids.append(int(order[torch.multinomial(p, 1, generator=generator)]))
            if ids[-1] == end or len(ids) >= n_tokens:
                break
        if ids[-1] != end:
            ids.append(end)
        ids += _ids(tokenizer, "\n")
        turn += 1
    return ids[:n_tokens]


def chat(tokenizer: Any, model: Any, topic: str, n_tokens: int, folder: Path) -> torch.Tensor:
    """Return the first `n_tokens` tokens of a chat, 1 x n_tokens, from disk if it is there.

    A longer chat on the same topic serves as well: the beginning is the same.
    """
    about = json.dumps(
        [SEED, MAX_ANSWER_TOKENS, TEMPERATURE, TOP_P, topic, TOPICS[topic], FOLLOW_UPS]
    )
    digest = hashlib.sha256(about.encode()).hexdigest()[:12]
    path = folder / f"chat-{topic}-{digest}.json"
    ids = json.loads(path.read_text()) if path.is_file() else []
    if len(ids) < n_tokens:
        ids = generate(tokenizer, model, topic, n_tokens)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ids))
    return torch.tensor([ids[:n_tokens]])
