"""Train a GPT-2 of the denoisers' size on text that comes with Python: its standard library and its licence.

The text is the docstrings of all modules, classes and functions that `ast` finds, and the interpreter's licence. One
file in twenty is held out for testing (`held_out`).
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from small_models import new_gpt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from train_reference import Run
from training_stage import Workshop
from transformers import PreTrainedTokenizerFast

VOCABULARY, CONTEXT = 4096, 256
END = "<|endoftext|>"
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def held_out(path: Path) -> bool:
    return zlib.crc32(path.name.encode()) % 20 == 0


def texts(test: bool, library: Path = LIBRARY) -> Iterator[str]:
    """Docstrings, one file at a time, then the licence."""
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts and held_out(path) == test:
            yield from _docstrings(path)
    licence = library / "LICENSE.txt"
    if licence.exists() and not test:
        yield licence.read_text(encoding="utf-8")


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the library contains invalid files that test its parser
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found and len(found) > 20:
                yield found


def train_gpt(shop: Workshop, steps: int, batch: int = 16, library: Path = LIBRARY) -> None:
    """Train next-token prediction and print the perplexity of the held-out files at the end."""
    tokenizer = gpt_tokenizer(shop.work / "gpt-tokenizer.json", library)
    train, test = (_ids(tokenizer, texts(wanted, library)) for wanted in (False, True))
    gpt = new_gpt(VOCABULARY, CONTEXT).to(shop.device)
    run = Run(shop.work / "gpt.pt", gpt, 2e-3, steps)
    for step in run:
        tokens = _windows(train, torch.randint(len(train) - CONTEXT, (batch,))).to(shop.device)
        with shop.autocast():
            loss = gpt(tokens, labels=tokens).loss
        run.descend(loss.float())
        if step % 50 == 0:
            print(f"gpt {step}: perplexity of the batch {loss.exp().item():.1f}", flush=True)
    run.ema.copy_to(gpt.parameters())
    print(f"gpt: perplexity {perplexity(gpt.eval(), test):.2f} on {len(test)} held-out tokens", flush=True)


@torch.no_grad()
def perplexity(gpt: nn.Module, tokens: torch.Tensor) -> float:
    """Perplexity over consecutive windows of CONTEXT tokens."""
    starts = torch.arange(0, len(tokens) - CONTEXT, CONTEXT)
    device = next(gpt.parameters()).device
    losses = [gpt(part.to(device), labels=part.to(device)).loss for part in _windows(tokens, starts).split(16)]
    return float(torch.stack(losses).mean().exp())


def _windows(tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return tokens[starts[:, None] + torch.arange(CONTEXT)]


def _ids(tokenizer: Tokenizer, found: Iterator[str]) -> torch.Tensor:
    encoded = tokenizer.encode_batch([f"{text}{END}" for text in found])
    return torch.tensor([i for text in encoded for i in text.ids])


def gpt_tokenizer(path: Path, library: Path = LIBRARY) -> Tokenizer:
    """A byte-level BPE tokenizer, trained once on the training texts."""
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts(False, library), trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def write_gpt(shop: Workshop, folder: Path) -> None:
    """Write a transformers folder in float16."""
    gpt = shop.finished("gpt", new_gpt(VOCABULARY, CONTEXT))
    gpt.to(torch.float16).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=gpt_tokenizer(shop.work / "gpt-tokenizer.json"), eos_token=END)
    fast.save_pretrained(folder)
