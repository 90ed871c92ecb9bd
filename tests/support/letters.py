"""A tokenizer for the tiny target, whose output is then text with stops and ends of thinking."""

from __future__ import annotations

from pathlib import Path

PIECES = (
    *("<bos>", "<eos>", "<pad>", "<", "/", "t", "h", "i", "n", "k", ">", "Ġ", "th", "in", "nk"),
    *("Ġt", "Ġh", "</", "hi", "1", "2", ",", "Ã", "©"),
)
"""The text of each token in byte-level notation: Ġ is a space, and Ã© the two bytes of é."""


def add_tokenizer(folder: Path | str) -> None:
    """Write tokenizer files into the folder of a checkpoint with as many tokens as `PIECES`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {piece: token for token, piece in enumerate(PIECES)}
    merges = [(piece[0], piece[1]) for piece in PIECES if len(piece) == 2]
    bare = Tokenizer(models.BPE(ids, merges))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=bare, **names).save_pretrained(folder)
