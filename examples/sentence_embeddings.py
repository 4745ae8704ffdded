"""Train sentence embeddings with IsoBN: pip install "isobn_kernels[sentence-transformers]".

    python examples/sentence_embeddings.py                      # MPNet on pairs of AllNLI, from the hub
    python examples/sentence_embeddings.py --model path/to/encoder --train-file pairs.jsonl

A line of the file is a JSON object with "anchor" and "positive", two texts of one meaning.
"""

import argparse

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from isobn_kernels.integrations.sentence_transformers import IsoBNModule


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="microsoft/mpnet-base")
    parser.add_argument("--train-file")
    parser.add_argument("--output", default="runs/sentence_embeddings")
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()

    if args.train_file:
        data = load_dataset("json", data_files=args.train_file, split="train")
    else:
        data = load_dataset("sentence-transformers/all-nli", "pair", split="train[:20000]")

    transformer = Transformer(args.model)
    size = transformer.get_embedding_dimension()
    # Behind Pooling and before Normalize, which undoes a common factor but not a scale of each feature.
    model = SentenceTransformer(modules=[transformer, Pooling(size), IsoBNModule(size), Normalize()])

    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            args.output, num_train_epochs=args.epochs, per_device_train_batch_size=32, report_to="none"
        ),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
    )
    print(f"loss {trainer.train().training_loss:.3f}")
    model.save_pretrained(args.output)  # the statistics and the options of IsoBN too

    # trust_remote_code: sentence-transformers asks for it where a module is another package's, as IsoBNModule is.
    loaded = SentenceTransformer(args.output, trust_remote_code=True)
    pair = loaded.encode([data[0]["anchor"], data[0]["positive"]])
    print(f"similarity of the first pair {loaded.similarity(pair[0], pair[1]).item():.3f}")


if __name__ == "__main__":
    main()
