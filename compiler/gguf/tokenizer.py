"""The tokenizer that a GGUF file's `tokenizer.*` keys describe, as files of a model folder.

The keys mean what llama.cpp's reader takes them for, defaults included. Two kinds of vocabulary belong to causal
models: `llama` (SentencePiece's: whole text, pairs joined by the score of what they make) and `gpt2` (bytes, pairs
joined in a listed order after text is cut by patterns); `gemma4` is the first with the listed order of the second.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from pagegraph.compiler.gguf.file import GgufFile

log = logging.getLogger("pagegraph.gguf")

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # of token_type; 1 is an ordinary token
SPACE = "\u2581"

# What is read here: ids by what they are for, and the rest.
IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}
READ = {
    *IDS.values(),
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template",
}
# What changes nothing about text to ids and back for these vocabularies, so that it is only said to be there.
WITHOUT_EFFECT = {
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.cls_token_id",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.token_type_count",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.precompiled_charsmap",
    "tokenizer.ggml.added_tokens",
    "tokenizer.huggingface.json",
    "tokenizer.rwkv.world",
    "tokenizer.chat_templates",
    *(f"tokenizer.ggml.fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *(f"tokenizer.ggml.{part}_token_id" for part in ("prefix", "suffix", "middle")),
}
NAMED_TEMPLATE = "tokenizer.chat_template."
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {"bos": 11, "eos": 11}, "gemma4": {}}

# A file that names no end of a turn has it under one of these names.
ENDINGS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
}  # fmt: skip
# A vocabulary with all of the first ends by these, not by the second, which stands inside its turns.
NOT_AN_END = [({"<|return|>", "<|call|>"}, "<|end|>"), ({"<|calls|>", "<|flush|>"}, "<|end|>")]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(ending: str, digits: str) -> str:
    """A pattern that cuts words where lower case is followed by upper case."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}[{_UPPER}]*[{_LOWER}]+{ending}|{before}[{_UPPER}]+[{_LOWER}]*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_DEEPSEEK3 = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _SPACES,
]
_DIGITS_APART = [r"\p{N}", _GPT2]


@dataclass(frozen=True, slots=True)
class Cut:
    """How text is cut before pairs are merged: by each pattern in turn; matches and what lies between are pieces."""

    patterns: list[str]
    ignore_merges: bool = False  # a piece that is a token stays whole
    add_bos: bool = False  # where the file says nothing


# tokenizer.ggml.pre -> how text is cut.
CUTS: dict[str, Cut] = {
    name: cut
    for names, cut in [
        ("default", Cut([r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"])),
        (
            "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling modern-bert",
            Cut([_GPT2]),
        ),
        ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", Cut(_DIGITS_APART)),
        (
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
            Cut([_LLAMA3], ignore_merges=True, add_bos=True),
        ),
        ("dbrx smaug-bpe glm4 chatglm-bpe", Cut([_LLAMA3])),
        ("qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2", Cut([_QWEN2])),
        ("qwen35", Cut([_QWEN35])),
        ("tekken", Cut([_cased("", r"\p{N}")], ignore_merges=True, add_bos=True)),
        ("gpt-4o llama4 kanana2 minimax-m2", Cut([_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")])),
        ("deepseek-v3 hunyuan-dense", Cut(_DEEPSEEK3)),
        (
            "deepseek-coder",
            Cut([r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"]),
        ),
        ("falcon", Cut([r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"])),
    ]
    for name in names.split()
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id with their types, what each named id is, and which end text."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    endings: list[int]

    def as_they_stand(self, *wanted: int, special: bool) -> list[AddedToken]:
        """Tokens of these types, which are found in text as it is, before anything else."""
        return [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(self.tokens, self.types)
            if kind in wanted
        ]


def read_tokenizer(file: GgufFile) -> tuple[tokenizers.Tokenizer, Vocabulary]:
    """The tokenizer and its vocabulary; raises GgufError for kinds that are not served and unknown keys."""
    _refuse_unknown(file)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in DEFAULT_IDS:
        raise file.refuse("tokenizer.ggml.model", kind, f"is not served; {', '.join(DEFAULT_IDS)} are")
    vocabulary = _vocabulary(file, DEFAULT_IDS[kind])
    if kind == "gpt2":
        backend, add_bos = _of_bytes(file, vocabulary)
    else:
        backend, add_bos = _of_pieces(file, vocabulary, kind)
    backend.add_special_tokens(vocabulary.as_they_stand(CONTROL, UNKNOWN, special=True))
    backend.add_tokens(vocabulary.as_they_stand(USER_DEFINED, special=False))
    asked = {
        "bos": file.metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        "eos": file.metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    for name in asked:
        if asked[name] and name not in vocabulary.ids:
            raise file.refuse(f"tokenizer.ggml.add_{name}_token", True, f"but the file has no {IDS[name]}")
    if any(asked.values()):
        around = {
            name: (vocabulary.tokens[vocabulary.ids[name]], vocabulary.ids[name]) for name in asked if asked[name]
        }
        single = [
            around[name][0] if name in around else name
            for name in ("bos", "$A", "eos")
            if name in around or name == "$A"
        ]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(around.values()))
    return backend, vocabulary


def save_tokenizer(file: GgufFile, folder: Path) -> Vocabulary:
    """Write tokenizer.json, tokenizer_config.json and the chat template into `folder`."""
    backend, vocabulary = read_tokenizer(file)
    backend.save(str(folder / "tokenizer.json"))
    kinds = [name for name in ("bos", "eos", "unk", "pad") if name in vocabulary.ids]
    named = {f"{name}_token": vocabulary.tokens[vocabulary.ids[name]] for name in kinds}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    if template := file.metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return vocabulary


def _refuse_unknown(file: GgufFile) -> None:
    keys = {key for key in file.metadata if key.startswith("tokenizer.")} - READ
    idle = {key for key in keys if key in WITHOUT_EFFECT or key.startswith(NAMED_TEMPLATE)}
    for key in sorted(keys - idle):
        raise file.refuse(key, file.metadata[key], "is not known here and may change what text becomes")
    if idle:
        log.info("%s: not read, and without effect here: %s", file.path.name, ", ".join(sorted(idle)))


def _vocabulary(file: GgufFile, ids: dict[str, int]) -> Vocabulary:
    metadata = file.metadata
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(metadata.get("tokenizer.ggml.tokens") or [])]
    if not tokens:
        raise file.refuse("tokenizer.ggml.tokens", None, "names no vocabulary")
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise file.refuse("tokenizer.ggml.tokens", twice, "is there twice, so that its text has no one id")
    types = list(metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens))
    if len(types) != len(tokens):
        raise file.refuse("tokenizer.ggml.token_type", len(types), f"types belong to {len(tokens)} tokens")
    said = {name: metadata[key] for name, key in IDS.items() if key in metadata}
    for name, index in said.items():
        if not 0 <= index < len(tokens):
            raise file.refuse(IDS[name], index, f"is outside the vocabulary of {len(tokens)} tokens")
    by_text = {token: index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.token_type" not in metadata:
        types = [BYTE if token.startswith("<0x") and len(token) == 6 else 1 for token in tokens]
        for index in said.values():
            types[index] = CONTROL
    # A default holds where such a token exists at all.
    ids = {
        name: index for name, index in ids.items() if index < len(tokens) and types[index] in (CONTROL, UNKNOWN)
    } | said
    named = {by_text[text] for text in ENDINGS if text in by_text and types[by_text[text]] in (CONTROL, USER_DEFINED)}
    for others, text in NOT_AN_END:
        if all(other in by_text and by_text[other] in named for other in others):
            named.discard(by_text.get(text))
    endings = sorted(named | {ids[name] for name in ("eos", "eot", "eom") if name in ids})
    for index in endings:
        types[index] = CONTROL  # it ends text and is no part of it
    return Vocabulary(tokens, types, ids, endings)


def _of_bytes(file: GgufFile, vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    name = file.metadata.get("tokenizer.ggml.pre")
    if name is None:
        log.warning(
            "%s names no tokenizer.ggml.pre, as old files do: text is cut by the default patterns, which may not be"
            " the model's",
            file.path.name,
        )
        name = "default"
    if name not in CUTS:
        raise file.refuse("tokenizer.ggml.pre", name, f"is not served; {', '.join(sorted(CUTS))} are")
    cut = CUTS[name]
    backend = tokenizers.Tokenizer(_pairs(file, vocabulary, _listed_merges(file), ignore_merges=cut.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, cut.add_bos


def _of_pieces(file: GgufFile, vocabulary: Vocabulary, kind: str) -> tuple[tokenizers.Tokenizer, bool]:
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", kind == "llama")
    merges = merges_by_score(file, vocabulary) if kind == "llama" else _listed_merges(file)
    unknown = vocabulary.tokens[vocabulary.ids["unk"]] if "unk" in vocabulary.ids else None
    backend = tokenizers.Tokenizer(
        _pairs(file, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    if kind == "gemma4":
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _listed_merges(file: GgufFile) -> list[tuple[str, str]]:
    """Pairs out of texts with one space between two parts; the first part may begin with a space."""
    listed = file.metadata.get("tokenizer.ggml.merges")
    if not listed:
        raise file.refuse("tokenizer.ggml.merges", None, "names no pairs to join")
    places = [text.find(" ", 1) for text in listed]
    return [(text[:place], text[place + 1 :]) for text, place in zip(listed, places)]


def merges_by_score(file: GgufFile, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Pairs in the order in which they are joined: those of the token with the highest score first.

    Of equal pairs the leftmost is joined first. All ways to make one token have the same score but need an order here:
    where two of them overlap (ab + a + ba, for aba) the left one is the one whose first part is a period of the token.
    """
    scores: Sequence[float] = file.metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(vocabulary.tokens):
        raise file.refuse("tokenizer.ggml.scores", len(scores), f"scores belong to {len(vocabulary.tokens)} tokens")
    each = zip(vocabulary.tokens, scores, vocabulary.types)
    ordinary = {token: score for token, score, kind in each if kind not in (CONTROL, UNKNOWN, BYTE)}
    ranked = sorted((token for token in ordinary if len(token) > 1), key=lambda token: -ordinary[token])
    merges = []
    for token in ranked:
        ways = [at for at in range(1, len(token)) if token[:at] in ordinary and token[at:] in ordinary]
        ways.sort(key=lambda at: (not token.startswith(token[at:]), -at))
        merges += [(token[:at], token[at:]) for at in ways]
    return merges


def _pairs(file: GgufFile, vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE({token: index for index, token in enumerate(vocabulary.tokens)}, merges, **options)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise file.refuse(
            "tokenizer.ggml.merges", len(merges), f"pairs do not belong to the vocabulary ({error})"
        ) from error
