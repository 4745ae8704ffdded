"""Fine-tune a classifier with IsoBN, with the Trainer of transformers: pip install "isobn_kernels[finetune]".

    python examples/trainer.py                                  # bert-base-cased on GLUE's RTE, from the hub
    python examples/trainer.py --model path/to/encoder --train-file train.jsonl --dev-file dev.jsonl

A line of a file is a JSON object with "sentence1", "sentence2" and "label", 0 or 1.
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

# This import also teaches from_pretrained to load models with IsoBN: a script that loads one needs it too.
from isobn_kernels.integrations.transformers import apply_isobn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="bert-base-cased")
    parser.add_argument("--train-file")
    parser.add_argument("--dev-file")
    parser.add_argument("--output", default="runs/trainer")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    if args.train_file:
        data = load_dataset("json", data_files={"train": args.train_file, "validation": args.dev_file})
    else:
        data = load_dataset("nyu-mll/glue", "rte")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = data.map(lambda row: tokenizer(row["sentence1"], row["sentence2"], truncation=True), batched=True)

    # The one line that is new: IsoBN goes between the pooled embedding and dropout + output layer.
    model = apply_isobn(AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2))

    trainer = Trainer(
        model=model,
        args=TrainingArguments(args.output, num_train_epochs=args.epochs, learning_rate=2e-5, report_to="none"),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(axis=1) == result.label_ids).mean()},
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.save_model(args.output)  # the statistics and the options of IsoBN too

    loaded = AutoModelForSequenceClassification.from_pretrained(args.output)
    print(f"saved in {args.output}: a {type(loaded).__name__}")


if __name__ == "__main__":
    main()
