"""The vocabulary: each word one token whatever the others are, and any text is told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lso_lightning.errors import UserError
from lso_lightning.models.vocabulary import build_tokenizer, write_tokenizer

WORDS = ["a", "an", "hair", "hat", "chair", "air", "airs", "smiling", "ling", "aa", "aaa", "aaaa", "aaaaa", "über"]


@pytest.mark.parametrize("words", [WORDS, WORDS[::-1], WORDS[3:], ["no"]])
def test_each_word_is_one_token(words: list[str]) -> None:
    tokenizer = build_tokenizer(words, 16)
    for word in words:
        (token,) = tokenizer.tokenize(word)
        assert tokenizer.decode(tokenizer.convert_tokens_to_ids([token])) == word


def test_many_words_that_share_parts() -> None:
    draw = random.Random(0)
    words = sorted({"".join(draw.choices("abc", k=draw.randint(1, 8))) for _ in range(400)})
    tokenizer = build_tokenizer(words, 16)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert len(set(tokenizer.get_vocab().values())) == len(tokenizer)


def test_the_order_of_words_does_not_matter() -> None:
    assert build_tokenizer(WORDS, 16).get_vocab() == build_tokenizer(WORDS[::-1] + WORDS, 16).get_vocab()


@pytest.mark.parametrize("text", ["hairy", "Hat, HAT!", "crème brûlée 42", "漢字", "a, b", "😀", "it's", "\n a\that "])
def test_any_text_is_told(text: str) -> None:
    tokenizer = build_tokenizer(WORDS, 64)
    tokens = tokenizer(text).input_ids
    assert tokens[0] == tokenizer.bos_token_id and tokens.index(tokenizer.eos_token_id) == len(tokens) - 1
    told = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(told.split()) == "".join(text.lower().split())


def test_a_comma_is_one_token_and_long_text_keeps_its_end() -> None:
    tokenizer = build_tokenizer(WORDS, 8)
    assert tokenizer.tokenize("hair, hat") == ["hair</w>", ",</w>", "hat</w>"]
    tokens = tokenizer("hat " * 20, truncation=True).input_ids
    assert len(tokens) == 8 and tokens[-1] == tokenizer.eos_token_id == len(tokenizer) - 1


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_a_folder_reads_back_the_same_with_the_old_or_the_new_files(tmp_path: Path, files: list[str]) -> None:
    from transformers import CLIPTokenizer

    tokenizer = build_tokenizer(WORDS, 16)
    write_tokenizer(tokenizer, tmp_path)
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - set(files):
        (tmp_path / name).unlink()
    again = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in ("a smiling hat, über airs", "something else 7", ""):
        assert again(text, padding="max_length").input_ids == tokenizer(text, padding="max_length").input_ids
    assert (again.model_max_length, again.bos_token_id, again.eos_token_id, again.pad_token_id) == (
        16, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_id
    )  # fmt: skip


def test_the_files_name_no_path(tmp_path: Path) -> None:
    write_tokenizer(build_tokenizer(WORDS, 16), tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "CLIPTokenizer"
    assert not any(str(tmp_path) in file.read_text() for file in tmp_path.iterdir())


@pytest.mark.parametrize("words", [["two words"], ["Hat"], ["it's"], ["v2"], [""], [" hat"], []])
def test_what_is_no_word_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"model(\.words: |: 0 words)"):
        build_tokenizer(words, 16)
