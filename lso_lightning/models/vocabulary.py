"""A vocabulary of one's own in CLIP's format: byte-level pairs (Sennrich et al. 2016, 1508.07909) in vocab.json."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from lso_lightning.errors import UserError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_END = "</w>"  # what the last letter of a word carries


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of a pair, from the left."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _pairs(words: list[list[str]]) -> list[tuple[str, str]]:
    """Merges, the most frequent pair first, until each word is one symbol; so that none disturbs another."""
    found = []
    while counts := Counter(pair for word in words for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        found.append(best)
        words = [_merge(word, best) for word in words]
    return found


def build_tokenizer(words: list[str], max_length: int) -> Any:
    """Make a tokenizer to which each of these words is one token; all other text is told in bytes or parts of words.

    Tokens are ordered as in CLIP's own vocabulary: bytes, last bytes of a word, merges, start, end. The end also pads.

    Args:
        words: lower-case words without white space. Single digits and punctuation marks are tokens without being asked.
        max_length: tokens of a text, start and end included; what is longer is cut.

    Returns:
        A ``transformers.CLIPTokenizer``.

    Raises:
        UserError: no word, one that CLIP's rules split or change, or too short a `max_length`.
    """
    from tokenizers.pre_tokenizers import ByteLevel  # here: seconds that `lso --help` must not pay
    from transformers import CLIPTokenizer

    if not words or max_length < 3:
        raise UserError(f"model: {len(words)} words and max_length {max_length}, expected at least 1 and 3")
    letters = sorted(ByteLevel.alphabet())
    spelt = ["".join(piece for piece, _ in ByteLevel(False, use_regex=False).pre_tokenize_str(word)) for word in words]
    pairs = _pairs([[*word[:-1], word[-1] + _END] for word in sorted(set(spelt)) if word])
    # two merges may make one token
    tokens = dict.fromkeys([*letters, *(f"{letter}{_END}" for letter in letters), *map("".join, pairs), BOS, EOS])
    tokenizer = CLIPTokenizer(
        {token: number for number, token in enumerate(tokens)}, pairs, model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    for word, spelling in zip(words, spelt, strict=True):
        if tokenizer.tokenize(word) != [f"{spelling}{_END}"]:
            raise UserError(
                f"model.words: {word!r} is {tokenizer.tokenize(word)} by CLIP's rules, which lower and split text at"
                " spaces, digits and punctuation; give lower-case words"
            )
    return tokenizer


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a folder that ``CLIPTokenizer.from_pretrained`` of any version reads.

    Args:
        tokenizer: of `build_tokenizer`.
        folder: where to; made if it is not there.
    """
    tokenizer.save_pretrained(folder)
    # transformers 5 writes one file of its own, older ones and other programs read these two
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in state["merges"])])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
