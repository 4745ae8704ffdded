"""Random data files, options and results folders for ``python -m isobn_kernels finetune``.

    python -m tools.fuzz_finetune --cases 500 --seed 0

Each case knows what has to happen: a file that can be read gives the rows that were written into it, and anything wrong
ends with exit status 2 and words. No exception escapes, and every file that was there before, other than results that
the command replaces, is there afterwards with the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isobn_kernels import cli
from isobn_kernels.cli._data import load_data
from isobn_kernels.cli._errors import CommandError

WORDS = ["good", "bad", "film", "book", "very", "not", "the", "a", "was", "it"]
# Texts that a reader may get wrong, each of them a text that somebody may have.
ODD = ['he said "no"', "a, b", "it was\ngood", "NA", "null", "None", "True", "1", "1e3"]
ODD += [" it ", "it's", "a;b", "\u2028", "naïve 😀"]
LABELS: list[list[Any]] = [[0, 1], [1, 2, 5], ["bad", "good"], ["01", "1"], ["NA", "x"], ["a b", "c,d"], [True, False]]
Rows = list[dict[str, Any]]


def make_encoder(folder: Path) -> Path:
    """A tiny BERT and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=15, max_position_embeddings=40, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 40}')
    return folder


def draw_rows(draw: random.Random, kind: str, labels: list[Any]) -> Rows:
    """Rows with every label at least once."""
    fields = draw.choice([("sentence",), ("sentence1", "sentence2")])

    def text() -> str:
        odd = draw.choice(ODD)
        if draw.random() < 0.7 or (kind == ".tsv" and "\n" in odd) or (kind == ".tsv" and odd.startswith('"')):
            return " ".join(draw.choices(WORDS, k=draw.randint(2, 6)))
        return odd

    count = draw.randint(len(labels) + 2, 12)
    chosen = [*labels, *draw.choices(labels, k=count - len(labels))]
    draw.shuffle(chosen)
    return [{**{field: text() for field in fields}, "label": label} for label in chosen]


def write_rows(path: Path, rows: Rows, draw: random.Random) -> None:
    """A file that says these rows, in one of the ways that the format allows."""
    extra = draw.random() < 0.3
    rows = [{**({"idx": n} if extra else {}), **row} for n, row in enumerate(rows)]
    if path.suffix == ".json":
        text = json.dumps(rows, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 2]))
    elif path.suffix == ".jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows) + draw.choice(
            ["", "\n", "\n\n"]
        )
    elif path.suffix == ".tsv":
        lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
        text = "\n".join("\t".join(line) for line in lines) + draw.choice(["", "\n", "\n\n"])
    else:
        file = io.StringIO()
        quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
        writer = csv.DictWriter(file, rows[0], quoting=quoting, lineterminator="\n")  # type: ignore[arg-type]
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    if path.suffix in (".tsv", ".jsonl") and draw.random() < 0.3:
        text = text.replace("\n", "\r\n")
    path.write_bytes((b"\xef\xbb\xbf" if draw.random() < 0.3 else b"") + text.encode())


# What is wrong with a file, by what it may be done to. Each takes the rows and the bytes, and gives the bytes.
Damage = Callable[[random.Random, Rows, bytes], bytes]


def _line(draw: random.Random, content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    lines = content.rstrip(b"\r\n").split(b"\n")
    number = draw.randrange(1, len(lines))
    lines[number] = change(lines[number])
    return b"\n".join(lines)


def _dumped(rows: Any) -> bytes:
    return json.dumps(rows).encode()


def _first_row(rows: Rows, key: str, value: Any) -> bytes:
    return _dumped([{**rows[0], key: value}, *rows[1:]])


SEPARATED: dict[str, Damage] = {
    "one field more": lambda draw, rows, content: _line(draw, content, lambda line: line.rstrip(b"\r") + b",x\tx"),
    "trailing separators": lambda draw, rows, content: _line(draw, content, lambda line: line.rstrip(b"\r") + b",\t"),
    "a field less": lambda draw, rows, content: _line(draw, content, lambda line: b"word"),
    "a column twice": lambda draw, rows, content: content.replace(b"label", b"label,label\tlabel", 1),
}
JSON: dict[str, Damage] = {
    "cut short": lambda draw, rows, content: content.rstrip()[: -draw.randint(1, 9)],
    "a key twice": lambda draw, rows, content: content.replace(b'"label":', b'"label": 0, "label":', 1),
    "not an object": lambda draw, rows, content: b"[1, 2, 3]",
    "columns": lambda draw, rows, content: _dumped({key: [row[key] for row in rows] for key in rows[0]}),
    "a key less": lambda draw, rows, content: _dumped([{"sentence": "a", "sentence1": "a", "sentence2": "a"}, *rows]),
    "a label of another kind": lambda draw, rows, content: _first_row(
        rows, "label", draw.choice([0.5, None, [1], {}, float("nan")])
    ),
    "a text of another kind": lambda draw, rows, content: _first_row(
        rows, next(iter(rows[0])), draw.choice([1, None, ["a"], True, {}])
    ),
    "half a surrogate pair": lambda draw, rows, content: _first_row(rows, next(iter(rows[0])), "\ud800"),
}
ANY: dict[str, Damage] = {
    "no bytes": lambda draw, rows, content: b"",
    "one row": lambda draw, rows, content: json.dumps(rows[:1]).encode(),
    "other names": lambda draw, rows, content: content.replace(b"sentence", b"text"),
    "no label": lambda draw, rows, content: content.replace(b"label", b"y"),
    "not UTF-8": lambda draw, rows, content: content + b"\n\xe9\xff",
    "UTF-16": lambda draw, rows, content: content.decode("utf-8-sig").encode("utf-16"),
    "noise": lambda draw, rows, content: bytes(draw.choices(range(256), k=200)),
}


class Fuzz:
    """Cases, one after the other, each in a folder of its own."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.counts: Counter[str] = Counter()
        self.encoder = make_encoder(root / "encoder")
        plain = "sentence,label\n" + "it was good,1\nthe film was bad,0\na very good book,1\nnot a film,0\n" * 2
        for name in ("train", "dev"):
            (root / f"{name}.csv").write_text(plain)
        self.plain = ["--train-file", str(root / "train.csv"), "--dev-file", str(root / "dev.csv")]
        self.earlier = root / "earlier"
        self.expect(0, [*self.command(self.plain), "--output", str(self.earlier)])

    def command(self, files: list[str]) -> list[str]:
        words = ["finetune", "--model", str(self.encoder), *files]
        return [*words, "--epochs", "1", "--seeds", "1", "--normalizer", "none"]

    def case(self, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        folder = self.root / f"case{number}"
        folder.mkdir()
        kind = draw.choices([self.data_case, self.option_case, self.folder_case], [8, 1, 1])[0]
        kind(draw, folder)
        shutil.rmtree(folder)

    def data_case(self, draw: random.Random, folder: Path) -> None:
        labels: list[Any] = draw.choice(LABELS)
        kinds = draw.choices([".json", ".jsonl", ".csv", ".tsv"], k=2)
        if labels == ["01", "1"]:  # which a CSV file alone cannot tell from text beside numbers
            kinds[1] = kinds[0]
        train = draw_rows(draw, kinds[0], labels)
        fields = [field for field in train[0] if field != "label"]
        dev = [
            {**{field: next(iter(row.values())) for field in fields}, "label": row["label"]}
            for row in draw_rows(draw, kinds[1], draw.sample(labels, k=draw.randint(1, len(labels))))
        ]
        written = (train, dev)
        paths = []
        for name, kind, rows in zip(("train", "dev"), kinds, written, strict=True):
            paths.append(folder / (draw.choice(["", "[1]", "*", "{a}", " b", "?"]) + name + kind))
            write_rows(paths[-1], rows, draw)
        files = ["--train-file", str(paths[0]), "--dev-file", str(paths[1])]
        if draw.random() < 0.3:
            data = load_data(None, paths[0], paths[1])
            for rows, split in zip(written, (data.train, data.dev), strict=True):
                read = [dict(row) for row in split]
                expected = [{**row, "label": data.classes.index(str(row["label"]))} for row in rows]
                assert read == expected, f"{read} was read, {expected} was written"
            self.counts["read as written"] += 1
            if draw.random() < 0.1:
                self.expect(0, [*self.command(files), "--output", str(folder / "out")], or_2=True)
                self.counts["trained"] += 1
            return
        damaged = draw.randrange(2)
        path, rows = paths[damaged], written[damaged]
        damage = draw.choice(list((ANY | (JSON if path.suffix.startswith(".json") else SEPARATED)).items()))
        path.write_bytes(damage[1](draw, rows, path.read_bytes()))
        message = self.expect(2, [*self.command(files), "--output", str(folder / "out")])
        assert str(path) in message, f"{damage[0]}: {message}"
        self.counts[f"data: {damage[0]}"] += 1

    def option_case(self, draw: random.Random, folder: Path) -> None:
        wrong = draw.choice(
            [
                ["--seeds", draw.choice(["-1", str(2**32), "x", "1.5", "9" * 5000])],
                ["--epochs", draw.choice(["0", "-3", "x", "1e3", str(10**30)])],
                ["--batch-size", draw.choice(["0", str(2**63), "nan"])],
                ["--learning-rate", draw.choice(["0", "-1", "nan", "inf", "1e400", "x"])],
                ["--momentum", draw.choice(["2", "-1", "nan", "inf"])],
                ["--eps", draw.choice(["0", "-1", "nan"])],
                ["--beta", draw.choice(["nan", "inf"])],
                ["--max-length", draw.choice(["0", "1", "2", "41", str(10**9)])],
                ["--max-dev-samples", draw.choice(["0", "1", "x"])],
                ["--normalizer", draw.choice(["batchnorm", ""])],
                ["--task", draw.choice(["wnli", "rte", "stsb", ""])],
                [
                    "--model",
                    draw.choice([str(folder / "nothing"), str(self.root / "train.csv"), str(folder), "", "a\nb"]),
                ],
                [
                    "--train-file",
                    draw.choice(
                        [str(folder), str(folder / "x.csv"), "", "x" * 5000 + ".csv", str(self.root / "dev.csv")]
                    ),
                ],
                ["--nonsense"],
                ["--output", draw.choice([str(self.root / "train.csv"), "/proc/nowhere", str(folder / ("x" * 300))])],
            ]
        )
        self.expect(2, [*self.command(self.plain), "--output", str(folder / "out"), *wrong])
        self.counts[f"option: {wrong[0]}"] += 1

    def folder_case(self, draw: random.Random, folder: Path) -> None:
        output = folder / "out"
        resume = draw.choice([[], ["--resume"]])
        words = [*self.command(self.plain), "--output", str(output), *resume]
        if draw.random() < 0.5:
            what = "foreign"
            place = draw.choice(
                ["results.json", "results.md", "isotropy.png", "none/notes.txt", "runs/none-seed1/x", "runs"]
            )
            (output / place).parent.mkdir(parents=True)
            (output / place).write_text("mine")
            if draw.random() < 0.3:
                (output / place).unlink()
                (output / place).symlink_to(self.root / draw.choice(["train.csv", "nowhere"]))
        else:
            what = draw.choice(["changed", "added", "manifest", "lock"])
            shutil.copytree(self.earlier, output)
            listed = sorted(path for path in output.rglob("*") if path.is_file() and "manifest" not in path.name)
            if what == "changed":
                draw.choice(listed).write_bytes(draw.choice([b"", b"mine", bytes(100)]))
            elif what == "added":
                (draw.choice([path for path in listed if path.parent != output]).parent / "mine.txt").write_text("mine")
            elif what == "lock":
                (output / "isobn-manifest.lock").write_text("mine")
            else:
                manifest = output / "isobn-manifest.json"
                text = manifest.read_text()
                made = draw.choice(
                    [
                        text[: draw.randrange(len(text) - 2)],
                        "[]",
                        "{}",
                        '{"made_by": 1}',
                        text.replace('"none', '"../x'),
                    ]
                )
                manifest.write_text(made)
        self.expect(2, words)
        self.counts[f"folder: {what}"] += 1

    def expect(self, status: int, words: list[str], or_2: bool = False) -> str:
        """Run a command; returns what it wrote to stderr."""
        before = self.files()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                found: Any = cli.main(words)
            except SystemExit as exit_:
                found = exit_.code
        message = err.getvalue()
        assert found == status or (or_2 and found == 2), f"exit status {found}, expected {status}: {words}\n{message}"
        assert found == 0 or "error: " in message, f"no words: {words}"
        if found == 2:
            after = self.files()
            lost = [name for name, content in before.items() if after.get(name) != content]
            assert not lost, f"lost or changed {lost}: {words}"
        return message

    def files(self) -> dict[str, str]:
        """Every file and link here, with its content."""
        found = {}
        for folder, folders, names in os.walk(self.root):
            for path in (Path(folder) / name for name in [*folders, *names]):
                if path.is_symlink():
                    found[str(path)] = os.readlink(path)
                elif path.is_file():
                    found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


def run(cases: int, seed: int, root: Path) -> tuple[list[str], Counter[str]]:
    """What went wrong, and how many cases of each kind there were."""
    fuzz, failures = Fuzz(root, seed), []
    for number in range(cases):
        try:
            fuzz.case(number)
        except (Exception, CommandError):
            failures.append(f"case {number}, in {root / f'case{number}'}\n{traceback.format_exc()}")
    return failures, fuzz.counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_finetune", description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fuzz_finetune_"))
    failures, counts = run(args.cases, args.seed, root)
    for kind, count in sorted(counts.items()):
        print(f"{count:5}  {kind}")
    print("\n".join(failures))
    print(f"{args.cases} cases, {len(failures)} failures" + (f"; their files are in {root}" if failures else ""))
    if not failures:
        shutil.rmtree(root)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
