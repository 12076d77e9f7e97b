"""Training beside the same model and loop in plain PyTorch (torch_loop.py), in a process each.

    python benchmarks/training.py [--large]     steps taking turns: ms and peak memory of each
    python benchmarks/training.py --run DATA    the recipe shakespeare-cpu, whole, on a folder
                                                      of prepared tokens: validation loss and time

Both begin with the same weights and take the same batches and learning rates.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median

import numpy as np

from tinygpt import GPT
from tinygpt.data.dataset import Batches, Dataset
from tinygpt.evaluation.losses import mean_loss, spread
from tinygpt.training.schedule import scheduled
from tinygpt.training.settings import RECIPES, TrainConfig

SMALL = TrainConfig.of(RECIPES["shakespeare-cpu"])
LARGE = replace(SMALL, n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=8)
THREADS, VOCABULARY, STEPS_A_TURN = 2, 65, 10


class Ours:
    def __init__(self, config: TrainConfig) -> None:
        from tinygpt.evaluation.losses import Scorer
        from tinygpt.training.step import Trainer

        model = GPT(config.gpt_config(VOCABULARY), config.seed)
        self.trainer, self.losses = Trainer(model, config), Scorer(model).losses

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        return self.trainer.step([(inputs, targets)]).loss


class Torch:
    def __init__(self, config: TrainConfig) -> None:
        import torch
        from tinygrad.nn.state import get_state_dict
        from torch_loop import TorchGPT, train_step

        torch.set_num_threads(THREADS)
        model = GPT(config.gpt_config(VOCABULARY), config.seed)
        weights = {name: tensor.numpy() for name, tensor in get_state_dict(model).items()}
        self.torch, self.train_step, self.config, self.done = torch, train_step, config, 0
        self.model = TorchGPT(model.config).load(weights)
        self.optimizer = self.model.adamw(betas=(config.beta1, config.beta2))

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled(
                self.done, c.steps, c.warmup_steps, c.schedule, c.learning_rate, c.min_learning_rate
            )
        self.done += 1
        pair = (self.torch.from_numpy(array).long() for array in (inputs, targets))
        return self.train_step(self.model, self.optimizer, *pair, c.grad_clip)

    def losses(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The mean in each place: enough for a mean over whole windows."""
        with self.torch.inference_mode():
            pair = (self.torch.from_numpy(array).long() for array in (inputs, targets))
            return np.full(inputs.shape, self.model(*pair).item(), np.float32)


def serve(name: str, large: bool, data: str | None) -> None:
    """Answer each line of stdin, a number of steps, with a line of JSON."""
    config = LARGE if large else SMALL
    program = {"ours": Ours, "torch": Torch}[name](config)
    dataset = Dataset.open(data) if data else None
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 10**5).astype(np.uint16)
    train, val = (dataset.train, dataset.val) if dataset else (tokens, tokens[:1000])
    batches = Batches(train, config.batch_size, config.block_size, config.seed)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            program.step(*next(batches))
        seconds = time.perf_counter() - start
        reply = {"s": seconds, "bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        if dataset:
            places = spread(len(val), config.block_size, 200 * config.batch_size)
            places = places[: len(places) // config.batch_size * config.batch_size]
            sizes = config.block_size, config.batch_size
            reply["val_loss"] = mean_loss(program.losses, val, places, *sizes)
        print(json.dumps(reply), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="6 layers of 384, window 256, batch 8")
    parser.add_argument("--run", metavar="DATA", help="train whole, on a folder of characters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.large, args.run)
        return
    command = [sys.executable, __file__, *(["--large"] if args.large else [])]
    command += ["--run", args.run] if args.run else []
    processes = {
        name: subprocess.Popen(
            [*command, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        for name in ("ours", "torch")
    }

    def ask(name: str, steps: int) -> dict[str, float]:
        processes[name].stdin.write(f"{steps}\n")
        processes[name].stdin.flush()
        return json.loads(processes[name].stdout.readline())

    if args.run:
        for name in processes:
            reply = ask(name, SMALL.steps)
            print(f"{name}: validation loss {reply['val_loss']:.4f} in {reply['s']:.0f} s")
        return
    times: dict[str, list[float]] = {name: [] for name in processes}
    for turn in range(args.rounds + 1):
        for name in processes:
            reply = ask(name, STEPS_A_TURN)
            times[name] += [reply["s"] / STEPS_A_TURN] if turn else []  # the first one compiles
            if turn == args.rounds:
                middle, peak = median(times[name]) * 1e3, reply["bytes"] / 1e6
                print(f"{name}: {middle:.1f} ms a step, peak memory {peak:.0f} MB")
    print(f"ours / torch: {median(times['ours']) / median(times['torch']):.2f}")


if __name__ == "__main__":
    main()
