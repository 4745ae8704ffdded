"""Data files of ``finetune``: what is read is what the file says, or an error shows the row."""

import csv
import json
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason='needs pip install "isobn_kernels[finetune]"')

from isobn_kernels.cli._data import Data, load_data
from isobn_kernels.cli._errors import CommandError

GOOD = "sentence,label\nit was good,1\nit was bad,0\n"
ROWS = [{"sentence": "it was good", "label": 1}, {"sentence": "it was bad", "label": 0}]


def load(folder: Path, train: str | bytes, dev: str | bytes = GOOD, names=("train.csv", "dev.csv"), task=None) -> Data:
    paths = [folder / name for name in names]
    for path, content in zip(paths, (train, dev), strict=True):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_data(task, *paths)


@pytest.mark.parametrize(
    "name", ["train[1]", "train*", "tr?in", "{train,dev}", "a b", "[!x]", "train:0", "~train", "ŧ"]
)
def test_a_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    for neighbour in ("train1.csv", "trainX.csv", "train.csv", "dev.csv", "y.csv"):
        (tmp_path / neighbour).write_text("sentence,label\nANOTHER FILE,1\nnot asked for,0\n")
    data = load(tmp_path, GOOD, names=(f"{name}.csv", "other[2].csv"))
    assert list(data.train["sentence"]) == list(data.dev["sentence"]) == ["it was good", "it was bad"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", GOOD),
        ("a.CSV", "\ufeff" + GOOD.replace("\n", "\r\n")),
        ("a.csv", "\n" + GOOD.replace("\n", "\n\n")),
        ("a.csv", '"sentence","label"\n"it was good","1"\n"it was bad","0"'),
        ("a.csv", ",sentence,label\n0,it was good,1\n1,it was bad,0\n"),  # with the index of pandas
        ("a.csv", GOOD.replace(",1", ", 1")),
        ("a.tsv", GOOD.replace(",", "\t")),
        ("a.tsv", "\ufeff" + GOOD.replace(",", "\t").replace("\n", "\r\n")),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff  \n" + json.dumps(ROWS, indent=4)),
        ("a.json", "\r\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("a.jsonl", json.dumps(ROWS)),
    ],
)
def test_ways_to_say_the_same(name: str, content: str, tmp_path: Path) -> None:
    data = load(tmp_path, content, names=(name, "dev.csv"))
    assert [dict(row) for row in data.train] == ROWS
    assert data.classes == ("0", "1")


@pytest.mark.parametrize(
    "text",
    [
        "a, b", 'he said "no"', '"no"', "two\nlines", "two\r\nlines", " blanks ", "NA", "None", "1", "1e3", "True",
        "line\u2028separator", "next\x85line", "form\x0cfeed", "\t", "😀", "'", "x" * 200_000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_texts_stay_as_they_are(text: str, kind: str, tmp_path: Path) -> None:
    rows = [{"sentence": text, "label": "x"}, {"sentence": "b", "label": "y"}]
    path = tmp_path / f"train.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    (tmp_path / "dev.csv").write_text("sentence,label\na,x\nb,y\n")
    data = load_data(None, path, tmp_path / "dev.csv")
    assert list(data.train["sentence"]) == [text, "b"]


def test_a_long_field_leaves_the_limit_of_csv_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    load(tmp_path, GOOD)
    with pytest.raises(CommandError):
        load(tmp_path, GOOD + '"')
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "sentence,label\nit,1\nNot good, really,0\n",
            r"row 2, on line 3, has 3 fields .* has 2: \['Not good'",
        ),
        ("a.csv", 'sentence,label\n"two\nlines",1\nit,0,\n', r"row 2, on line 4, has 3 fields"),
        ("a.csv", "sentence,label\nit,1\nbad\n", r"row 2, on line 3, has 1 fields and the header has 2: \['bad'\]"),
        ("a.csv", "sentence,label\n\nit,1,2\n", r"row 1, on line 3, has 3 fields"),
        ("a.csv", 'sentence,label\nit,1\n"bad,0\nx,1\n', "row 2, on line 3, begins '\"bad,0'"),
        ("a.csv", 'sentence,label\n"a" b,1\nc,0\n', "row 1, on line 2, begins"),
        ("a.csv", '"sentence,label\n', "the header, on line 1, begins"),
        ("a.csv", "sentence,sentence,label\na,b,1\n", "names 'sentence' more than once"),
        ("a.csv", "sentence;label\na;1\nb;0\n", "has the fields 'sentence;label'; expected 'sentence'"),
        ("a.csv", "sentence,label\n", "has 0 rows; at least 2"),
        ("a.csv", "\n\n", "has 0 rows"),
        ("a.csv", GOOD + ",1\n", r"'sentence' of row 3 is ''; expected text. Row: \{'sentence': '', 'label': '1'\}"),
        ("a.csv", GOOD.encode() + b"caf\xe9,0\n", "line 4 is not UTF-8"),
        ("a.csv", GOOD.encode("utf-16"), "line 1 is not UTF-8"),
        ("a.tsv", "sentence\tlabel\na\tb\t1\nc\t0\n", "row 1, on line 2, has 3 fields"),
        ("a.tsv", 'sentence\tlabel\n"a ""b"" c"\t1\nc\t0\n', "row 1, on line 2, is quoted as in a CSV file"),
        ("a.tsv", 'sentence\tlabel\n"two\nlines"\t1\nc\t0\n', "row 1, on line 2, has 1 fields"),
        ("a.json", '{"sentence": ["a", "b"], "label": [0, 1]}', "has 1 rows; at least 2"),
        ("a.json", "[]", "has 0 rows"),
        ("a.json", "7\n8\n", "row 1 is 7; expected an object a line, or one array of objects"),
        ("a.json", '[{"sentence": "a", "label": 1}, null]', "row 2 is None"),
        ("a.json", '[{"sentence": "a", "label": 1}', "cannot be read as json"),
        ("a.json", "[" * 100_000, "cannot be read as json"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b"}\n', "'label' of row 2 is missing"),
        ("a.jsonl", '{"label": 1, "sentence": "a"}\n{"label": 0}\n', "'sentence' of row 2 is missing"),
        ("a.jsonl", '{"sentence": "a", "label": 1, "label": 0}\n', "line 1 is .*'label' is named more than once"),
        ("a.jsonl", '{"sentence": "a", "label": 1} {"sentence"', "line 1 is "),
        (
            "a.jsonl",
            '{"sentence": ["a"], "label": 1}\n{"sentence": "b", "label": 0}',
            r"'sentence' of row 1 is \['a'\]",
        ),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "\\udc00", "label": 0}', "row 2 is .* surrogate pair"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b", "label": NaN}', "'label' of row 2 is nan"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b", "label": {}}', "'label' of row 2 is {}"),
    ],
)
def test_what_is_wrong_is_shown(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=message) as error:
        load(tmp_path, content, names=(name, "dev.csv"))
    assert str(tmp_path / name) in str(error.value)


def labelled(labels: list, kind: str) -> str:
    if kind == "csv":
        return "sentence,label\n" + "".join(f"text,{label}\n" for label in labels)
    return "\n".join(json.dumps({"sentence": "text", "label": label}) for label in labels)


@pytest.mark.parametrize(
    ("train", "dev", "classes", "numbers"),
    [
        ((["1", "0", "2"], "csv"), (["2", "2"], "csv"), ("0", "1", "2"), [2, 2]),
        ((["10", "9"], "csv"), (["9", "10"], "csv"), ("9", "10"), [0, 1]),
        ((["10", "9"], "json"), (["9", "10"], "csv"), ("10", "9"), [1, 0]),  # words there, and so here
        (([10, 9], "json"), (["9", " 10"], "csv"), ("9", "10"), [0, 1]),
        ((["9", "10"], "csv"), ([10, 9], "json"), ("9", "10"), [1, 0]),
        ((["01", "1"], "csv"), (["1", "01"], "csv"), ("01", "1"), [1, 0]),
        ((["1", "one"], "csv"), (["1", "1"], "csv"), ("1", "one"), [0, 0]),
        ((["1", "0"], "csv"), (["0", "0"], "csv"), ("0", "1"), [0, 0]),
        ((["True", "False"], "csv"), (["True", "True"], "csv"), ("False", "True"), [1, 1]),
        (([True, False], "json"), (["False", "True"], "csv"), ("False", "True"), [0, 1]),
        ((["True", "False"], "csv"), ([False, True], "json"), ("False", "True"), [0, 1]),
        ((["NA", "None"], "csv"), (["None", "NA"], "csv"), ("NA", "None"), [1, 0]),
        ((["9" * 30, "1"], "csv"), (["1", "1"], "csv"), ("1", "9" * 30), [0, 0]),
    ],
)
def test_labels_of_both_files(train, dev, classes, numbers, tmp_path: Path) -> None:
    names = [f"{name}.{kind}" for name, (_, kind) in (("train", train), ("dev", dev))]
    data = load(tmp_path, labelled(*train), labelled(*dev), names=names)
    assert data.classes == classes
    assert list(data.dev["label"]) == numbers


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        ((["1", "", "0"], "csv"), (["1", "0"], "csv"), "train.csv: 'label' of row 2 is ''"),
        ((["1", "0"], "csv"), (["1", ""], "csv"), "dev.csv: 'label' of row 2 is ''"),
        ((["1", "0.5"], "csv"), (["1", "0"], "csv"), "train.csv: 'label' of row 2 is '0.5'; expected a class"),
        ((["1", "0"], "csv"), (["1", "1.0"], "csv"), "dev.csv: 'label' of row 2 is '1.0'; expected a class"),
        (([1, 0.5, 2], "json"), (["1", "2"], "csv"), "train.json: 'label' of row 2 is 0.5; expected a class"),
        (
            ([1, 0], "json"),
            (["1", "zero"], "csv"),
            "dev.csv: 'label' of row 2 is 'zero'; expected a whole number, as in",
        ),
        (([1, 0], "json"), (["1", "0"], "json"), "dev.json: 'label' is 1 in row 1 of .*train.json and '1' in row 1"),
        (([True, 0], "json"), (["1", "0"], "csv"), "train.json: 'label' is 'True' in row 1 and 0 in row 2"),
        ((["-1", "1"], "csv"), (["1", "1"], "csv"), "train.csv: 'label' of row 1 is -1; GLUE's test splits"),
        (
            (["a", "b"], "csv"),
            (["a", "c"], "csv"),
            "dev.csv: unknown labels 'c'; .*Row 2: {'sentence': 'text', 'label': 'c'}",
        ),
        ((["a", "a"], "csv"), (["a", "a"], "csv"), "every label is 'a'"),
    ],
)
def test_labels_that_do_not_fit(train, dev, message: str, tmp_path: Path) -> None:
    names = [f"{name}.{kind}" for name, (_, kind) in (("train", train), ("dev", dev))]
    with pytest.raises(CommandError, match=message):
        load(tmp_path, labelled(*train), labelled(*dev), names=names)


@pytest.mark.parametrize("label", ["x", "", "nan", "inf", "1_0", "1e999"])
def test_scores(label: str, tmp_path: Path) -> None:
    text = "sentence1,sentence2,label\na,b,.5\nc,d,-1e3\ne,f,{}\n"
    data = load(tmp_path, text.format("4"), text.format(" 2 "), task="stsb")
    assert list(data.train["label"]) == [0.5, -1000.0, 4.0]
    with pytest.raises(CommandError, match=f"'label' of row 3 is '{label}'; expected a number"):
        load(tmp_path, text.format(label), text.format("1"), task="stsb")


def test_one_file_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "dev.csv").symlink_to("train.csv")
    with pytest.raises(CommandError, match="is both --train-file and --dev-file"):
        load_data(None, tmp_path / "train.csv", tmp_path / "dev.csv")


def test_places_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "dangling.csv").symlink_to("nothing")
    for name, message in {
        "folder.csv": "not a file",
        "dangling.csv": "no such file",
        "x" * 5000 + ".csv": "no such",
    }.items():
        with pytest.raises(CommandError, match=message):
            load_data(None, tmp_path / name, tmp_path / name)


def test_nothing_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nowhere/cache"))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("datasets guesses types and names")
    )
    assert load(tmp_path, GOOD).train.cache_files == []


def test_columns_are_looked_at_as_a_whole(tmp_path: Path) -> None:
    """No Python function of ours runs once a row: 400,000 pairs are not a reason to wait."""
    import cProfile
    import pstats

    calls = []
    for count in (100, 1000):
        rows = [{"sentence1": f"text {n}", "sentence2": "more", "label": n % 3} for n in range(count)]
        (tmp_path / "train.json").write_text(json.dumps(rows))
        (tmp_path / "dev.csv").write_text("sentence1,sentence2,label\n" + "a,b,1\n" * count)
        with cProfile.Profile() as profile:
            load_data(None, tmp_path / "train.json", tmp_path / "dev.csv")
        stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        calls.append(
            {key: value[0] for key, value in stats.items() if "isobn_kernels" in key[0] and key[2] not in ("_object",)}
        )
    many = {key: count for key, count in calls[1].items() if count > calls[0].get(key, 0) + 10}
    assert not {key[2] for key in many} - {"<genexpr>", "<listcomp>", "<setcomp>"}, many
