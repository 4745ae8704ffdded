"""IsoBN in a training loop of one's own, on one process or several with DistributedDataParallel.

    python examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py

The data are made up, and the first two layers stand for an encoder. Both commands train the same model, but for
rounding: the statistics are those of the whole batch, and there is no dropout, which would draw anew on each process.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from isobn_kernels import IsoBN


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/ddp.pt"))
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()

    distributed = "RANK" in os.environ  # torchrun sets it
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group()

    torch.manual_seed(0)  # the same data and the same weights on every rank
    inputs = torch.randn(2048, 32)
    data = TensorDataset(inputs, (inputs[:, :4].sum(dim=1) > 0).long())
    encoder = [torch.nn.Linear(32, 128), torch.nn.Tanh()]
    model = torch.nn.Sequential(*encoder, IsoBN(128), torch.nn.Linear(128, 2)).to(device)
    network: torch.nn.Module = model
    if distributed:
        # Statistics of the whole batch, not of the part that a rank has. Before DDP.
        IsoBN.convert_sync_isobn(model)
        network = DistributedDataParallel(model)

    sampler: DistributedSampler = DistributedSampler(data, world, rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for x, label in DataLoader(data, batch_size=64 // world, sampler=sampler):
            loss = torch.nn.functional.cross_entropy(network(x.to(device)), label.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            with torch.no_grad():
                guess = model.eval()(data.tensors[0].to(device)).argmax(dim=1).cpu()
            print(f"epoch {epoch + 1}: training accuracy {(guess == data.tensors[1]).float().mean():.3f}", flush=True)
    if rank == 0:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), args.output)  # the statistics too
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
