"""Texts as token ids: where they come from, and the tokenizer that a train split teaches.

Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes: Radford et al. 2019), so that no text has an unknown piece, from
HuggingFace's tokenizers. Of that library's trainers BPE's gives the same vocabulary every time; WordPiece's does not (docs/log.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys import spec
from portaisys.data.sources import Table, Tokens
from portaisys.spec import UserError

PAD, PAD_ID = "[PAD]", 0


def text(options: spec.Text) -> Table:
    """The texts of a file with their classes, in the order of the file; ids come with `learn`. Raises UserError naming file and line."""
    path = options.file
    pairs = list(KINDS[options.kind](path))
    if not pairs:
        raise UserError(f"data.path: {path} holds no row")
    texts, names = zip(*pairs, strict=True)
    labels = tuple(sorted(set(names)))
    if len(labels) < 2:
        raise UserError(f"data.path: {path}: every row has the label {labels[0]!r}; give rows of at least two classes")
    index = {name: number for number, name in enumerate(labels)}
    y = np.array([index[name] for name in names], np.int64)
    digest = hashlib.sha256(f"{labels}\0{chr(0).join(texts)}".encode()).hexdigest()
    bare = Table(_unlearnt, y, labels, (options.max_tokens,), digest)
    return replace(bare, learn=lambda train: _learn(bare, texts, train, options))


def _unlearnt(indices: NDArray[np.int64]) -> NDArray[Any]:
    raise AssertionError("texts have no ids before Table.learn")


# --- files --------------------------------------------------------------------------------------------------------

# The lexicographer files of nouns, by number (lexnames(5WN)); 3 is the unique beginners above all topics, which are no topic.
_TOPICS = (
    "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food", "group", "location", "motive",
    "object", "person", "phenomenon", "plant", "possession", "process", "quantity", "relation", "shape", "state", "substance", "time",
)  # fmt: skip


def _wordnet(path: Path) -> Iterator[tuple[str, str]]:
    """Glosses of WordNet's nouns and their topics: data.noun, wndb(5WN)."""
    for number, line in _lines(path, "latin-1", "install Debian's wordnet-base, or point data.path at WordNet's data.noun"):
        if line.startswith("  "):  # the licence
            continue
        head, bar, gloss = line.partition(" | ")
        fields = head.split(" ")
        if not bar or len(fields) < 2 or not fields[1].isdecimal() or not 3 <= int(fields[1]) < 4 + len(_TOPICS):
            raise UserError(f"data.path: {path}, line {number} is none of WordNet's data.noun")
        if fields[1] != "03":
            yield _filled(gloss, path, number), _TOPICS[int(fields[1]) - 4]


def _vader(path: Path) -> Iterator[tuple[str, str]]:
    """Snippets of film reviews, positive or negative by the mean of twenty readers (Hutto & Gilbert 2014): id, mean, text."""
    for number, line in _lines(path, "utf-8", "unpack hutto_ICWSM_2014.tar.gz of the sources of vaderSentiment 3.3.2"):
        fields = line.split("\t")
        try:
            mean = float(fields[1])
        except (IndexError, ValueError):
            mean = float("nan")
        if len(fields) != 3 or mean != mean:
            raise UserError(f"data.path: {path}, line {number} is not 'id, mean, text' with tabs between; it is another file")
        yield _filled(fields[2], path, number), "positive" if mean > 0 else "negative"


def _own(path: Path) -> Iterator[tuple[str, str]]:
    """A user's own rows: .tsv with a line of column names, or .jsonl; `text` and `label`, others are ignored."""
    readers = {".tsv": _tsv, ".jsonl": _jsonl}
    if path.suffix not in readers:
        raise UserError(f"data.path: {path}: texts come as .tsv (a line of column names, then tabs) or .jsonl (an object a line), each with 'text' and 'label'")
    for number, row in readers[path.suffix](path):
        if not {"text", "label"} <= row.keys():
            raise UserError(f"data.path: {path}, line {number} has {', '.join(sorted(map(str, row))) or 'nothing'}; it needs 'text' and 'label'")
        if not isinstance(row["text"], str) or not isinstance(row["label"], (str, int)) or not str(row["label"]).strip():
            raise UserError(f"data.path: {path}, line {number}: 'text' must be text, and 'label' a name or number")
        yield _filled(row["text"], path, number), str(row["label"])


def _tsv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    columns: list[str] = []
    for number, line in _lines(path, "utf-8"):
        fields = line.split("\t")
        columns = columns or fields
        if len(fields) != len(columns):
            raise UserError(f"data.path: {path}, line {number} has {len(fields)} columns and the first {len(columns)}; a text must hold no tab or line break, or come as .jsonl")
        if not {"text", "label"} <= set(columns):
            raise UserError(f"data.path: {path}, line 1 names the columns {', '.join(columns)}; it needs 'text' and 'label'")
        if number > 1:
            yield number, dict(zip(columns, fields, strict=True))


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path, "utf-8"):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"data.path: {path}, line {number} is no JSON object")
        yield number, row


def _lines(path: Path, encoding: str, advice: str = "write its path") -> Iterator[tuple[int, str]]:
    try:
        content = path.read_bytes().decode(encoding)
    except OSError as error:
        raise UserError(f"data.path: {path} cannot be read ({error.strerror}); {advice}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {path} is no {encoding} text ({error.reason} at byte {error.start})") from None
    # Not splitlines(), which also ends a line at characters that a text may hold.
    yield from enumerate((line.removesuffix("\r") for line in content.removesuffix("\n").split("\n") if content), 1)


def _filled(content: str, path: Path, number: int) -> str:
    if not content.strip():
        raise UserError(f"data.path: {path}, line {number} has no text; leave such rows out")
    return content.strip()


KINDS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {"wordnet": _wordnet, "file": _own, "vader": _vader}


# --- ids ----------------------------------------------------------------------------------------------------------


def _learn(bare: Table, texts: Sequence[str], train: NDArray[np.int64], options: spec.Text) -> Table:
    """The table with ids, of the user's own tokenizer or of one that has seen the train rows alone."""
    own = bool(options.tokenizer)
    tokenizer = own_tokenizer(Path(options.tokenizer).expanduser()) if own else learn_tokenizer([texts[index] for index in train], options.vocabulary)
    ids = [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=own)]
    whole = np.array([len(one) for one in ids], np.int64)
    if not whole.all():
        raise UserError(f"data.path: {options.file}: the text {texts[int(whole.argmin())]!r} is nothing but characters that the tokenizer leaves out; leave such rows out")
    tokenizer.enable_truncation(options.max_tokens)  # what is kept cuts as what was trained on
    for index in np.flatnonzero(whole > options.max_tokens).tolist():  # by the tokenizer, which keeps the marks of begin and end
        ids[index] = tokenizer.encode(texts[index], add_special_tokens=own).ids
    lengths = np.array([len(one) for one in ids], np.int64)
    about = tokenizer.to_str()
    return replace(
        bare, rows=_padded(np.concatenate([np.array(one, np.int32) for one in ids]), lengths), lengths=lengths, tokens=Tokens(texts, tokenizer.get_vocab_size(), about), learn=None,
        digest=hashlib.sha256(f"{bare.digest}{about}".encode()).hexdigest(), notes=_cut(whole, options.max_tokens),
    )  # fmt: skip


def own_tokenizer(path: Path) -> Any:
    """A tokenizer.json of HuggingFace's tokenizers, without its padding and truncation. Raises UserError when there is none, or 0 is not its padding."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"data.tokenizer: no file {path}; write the path of a tokenizer.json, or leave it out to learn one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"data.tokenizer: {path} is no tokenizer.json: {error}") from None
    zero = tokenizer.get_added_tokens_decoder().get(PAD_ID)
    if zero is None or not zero.special:
        raise UserError(f"data.tokenizer: {path}: id 0 is {tokenizer.id_to_token(PAD_ID)!r}, and texts are padded with 0; give a tokenizer whose padding is 0")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def learn_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A tokenizers.Tokenizer of at most `vocabulary` ids, lower case, 0 for padding; the same texts give the same one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _padded(flat: NDArray[np.int32], lengths: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """Rows out of all ids one after another, each batch padded to its own longest."""
    starts = np.cumsum(lengths) - lengths

    def rows(indices: NDArray[np.int64]) -> NDArray[np.int64]:
        counts = lengths[indices][:, None]
        column = np.arange(counts.max(initial=1))
        # Beyond a row's end stands the next row's start; beyond the last row's, nothing.
        positions = np.minimum(starts[indices][:, None] + column, len(flat) - 1)
        return np.where(column < counts, flat[positions], 0).astype(np.int64)

    return rows


def _cut(whole: NDArray[np.int64], most: int) -> tuple[str, ...]:
    cut = int((whole > most).sum())
    return (f"{cut:,} of {len(whole):,} texts were cut at data.max_tokens {most}; the longest has {int(whole.max())} tokens",) if cut else ()
