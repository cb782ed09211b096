"""A tokenizer as llama.cpp has it: the vocabulary, and a name for the rule that cuts a text into words."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from gqalib.errors import InputError
from gqalib.model import deci
from gqalib.run.corpora import encode, read_corpus

TEXT = ("python-docs", "test", 40)  # what the file's tokenizer is held to: 40 documents, and what those seldom have
SELDOM = "It's 3:07, I'LL pay $1,234.50…\r\n\n\t  naïve façade, 東京 🙂 x = [0]*10**9;   end  "


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """What `GGUFWriter.add_…` takes of a tokenizer; the vocabulary is filled up to the `rows` of the embeddings.

    Raises:
        InputError: it is neither SentencePiece's nor one that `deci.PRE_TOKENIZERS` names, or has more tokens than
        rows.
    """
    parts = {"model": {"type": type(tokenizer).__name__}, "pre_tokenizer": None}
    if tokenizer.is_fast:  # tokenizer.json, without what has no part in the tokens
        parts = json.loads(tokenizer.backend_tokenizer.to_str().replace('"trim_offsets":false', '"trim_offsets":true'))
    fields, vocab = _rule(tokenizer, parts, rows), parts["model"]["vocab"]
    if (last := max(vocab.values())) >= rows:
        raise InputError(
            f"the tokenizer has token {last}, but the embeddings end at {rows - 1}: give its own tokenizer"
        )
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [TokenType.UNUSED] * rows
    for token, i in vocab.items():
        byte = fields["tokenizer_model"] == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[i], kinds[i] = token, TokenType.BYTE if byte else TokenType.NORMAL
    for i, token in tokenizer.added_tokens_decoder.items():
        if i < rows:  # the model could not read it
            tokens[i], kinds[i] = token.content, deci.ADDED[not token.special]
    return fields | {"token_list": tokens, "token_types": kinds} | dict(_named(tokenizer, rows))


def _rule(tokenizer: PreTrainedTokenizerBase, parts: dict[str, Any], rows: int) -> dict[str, Any]:
    """How a text becomes tokens: which are joined first, and what it is cut into before."""
    model, rule = parts["model"], (parts["pre_tokenizer"], parts["model"].get("ignore_merges"))
    pre = next((name for name, known in deci.PRE_TOKENIZERS.items() if known == rule), None)
    pieces = model["type"] == "BPE" and model.get("byte_fallback")
    if not pieces and (model["type"] != "BPE" or pre is None or parts["normalizer"]):
        known = ", ".join(deci.PRE_TOKENIZERS)
        raise InputError(f"this {model['type']} tokenizer has no name in llama.cpp that export knows ({known}): "
                         "export a model with one of these or with SentencePiece's")  # fmt: skip
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    if not pieces:
        return {"tokenizer_model": "gpt2", "tokenizer_pre": pre, "token_merges": [" ".join(pair) for pair in merges]}
    scores, prefix = [-float(len(merges))] * rows, tokenizer.tokenize("a")[0].startswith(deci.SPACE)
    for place, pair in reversed(list(enumerate(merges))):
        if (token := model["vocab"]["".join(pair)]) < rows:
            scores[token] = -float(place)
    return {"tokenizer_model": "llama", "token_scores": scores, "add_space_prefix": prefix}


def _named(tokenizer: PreTrainedTokenizerBase, rows: int) -> Iterator[tuple[str, Any]]:
    """The tokens with a task, whether a text begins with one, and the chat template."""
    for name in deci.NAMED:
        if (token := getattr(tokenizer, f"{name}_token_id")) in range(rows):
            yield f"{name}_token_id", token
    yield "add_bos_token", encode(tokenizer, "", True) == [tokenizer.bos_token_id]
    template = tokenizer.chat_template
    if template := template.get("default") if isinstance(template, dict) else template:
        yield "chat_template", template


def check_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Raises InputError unless both give the same tokens for real text, rare characters and special tokens."""
    corpus, split, count = TEXT
    for text in (SELDOM, "".join(tokenizer.all_special_tokens), *islice(read_corpus(corpus, split), count)):
        if encode(tokenizer, text, True) != encode(other, text, True):
            start = " ".join(text.split())[:40]
            raise InputError(f"llama.cpp would read other tokens than the model in {start!r}: "
                             "export a model with the tokenizer that it was trained with")  # fmt: skip


def after_special(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """What is to be said where the two differ in text that begins with a space or follows a special token, as newer
    tokenizers of SentencePiece's kind and llama.cpp do; "" where they do not."""
    texts = " a", f"{tokenizer.eos_token}a"
    if all(encode(tokenizer, text, True) == encode(other, text, True) for text in texts):
        return ""
    where = "before text that begins with one or follows a special token"
    return f"\nllama.cpp puts a space {where}; this tokenizer does not"
