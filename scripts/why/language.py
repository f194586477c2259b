"""INT4 and INT8 in a small GPT-2: one call, the text it predicts, and the text it writes on its own.

All linear layers of the blocks are quantized; the embeddings, which are also the head, stay as they are. The columns:

    call          error of the logits on held-out text, relative to the logits' power, in dB; each position's logits are
                  centred first, because a constant does not change what they mean
    bias          share of that error's power that all positions have in common
    KL            divergence of the predictions from the unquantized model's, in nats per token, on held-out text; early
                  and late are the first and last quarter of the context
    perplexity    of held-out text
    agrees        share of positions where both models predict the same token
    free          after a prompt of 32 held-out tokens, both models continue greedily: the median token at which they
                  differ first, out of 96
    written       perplexity, under the unquantized model, of text that each model samples; the row "fp16" is the
                  unquantized model's own
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from text_training import CONTEXT, perplexity, texts
from tokenizers import Tokenizer
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from why.injected import CALL_ROWS, Run, blocks, noisy
from why.subjects import decibels, relative

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.grid import GridFormat
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.quantizers.bias_correction import bias_shift
from bitpolicy.kernels.quantizers.gptq import Curvature, gptq

WINDOWS, CALIBRATION = 32, 64  # windows of CONTEXT tokens; a prompt starts each half of the held-out ones
PROMPT, WRITTEN = 32, 96
ROUNDINGS = NEAREST, CORRECTED, GPTQ = "nearest", "nearest, corrected", "gptq, corrected"


class Language:
    """The model with its held-out and calibration windows, int64, shape (windows, CONTEXT)."""

    def __init__(self, folder: Path) -> None:
        self.model = linear(GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.test, self.calibration = _windows(tokenizer, True, WINDOWS), _windows(tokenizer, False, CALIBRATION)
        self.layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith("transformer.h.")
        }
        self.weights = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.biases = {name: layer.bias.detach().clone() for name, layer in self.layers.items()}
        self.moments = self._moments()

    @torch.no_grad()
    def _moments(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Mean input, shape (in), and mean of x x^T, shape (in, in), of each layer on the calibration windows."""
        sums: dict[str, list[torch.Tensor]] = {
            name: [torch.zeros(layer.in_features), torch.zeros(layer.in_features, layer.in_features)]
            for name, layer in self.layers.items()
        }
        count = self.calibration.numel()

        def keep(name: str, x: torch.Tensor) -> None:
            rows = x.flatten(0, -2)
            sums[name][0] += rows.sum(0) / count
            sums[name][1] += rows.T @ rows / count

        handles = [
            layer.register_forward_pre_hook(lambda _module, args, name=name: keep(name, args[0]))
            for name, layer in self.layers.items()
        ]
        for part in self.calibration.split(8):
            self.model(part)
        for handle in handles:
            handle.remove()
        return {name: (mean, moment) for name, (mean, moment) in sums.items()}

    def quantize(self, format: Format, rounding: str) -> None:
        for name, layer in self.layers.items():
            weight = self.weights[name]
            mean, moment = self.moments[name]
            if rounding == GPTQ:
                assert isinstance(format, GridFormat)
                tensors = gptq(format, weight, Curvature.of(format.rotated_hessian(moment)))
            else:
                tensors = format.quantize(weight)
            change = format.dequantize(tensors, weight.shape, torch.float32) - weight
            layer.weight.data.copy_(weight + change)
            shift = bias_shift(layer, change, mean) if rounding != NEAREST else 0.0
            layer.bias.data.copy_(self.biases[name] + shift)

    def restore(self) -> None:
        for name, layer in self.layers.items():
            layer.weight.data.copy_(self.weights[name])
            layer.bias.data.copy_(self.biases[name])

    @torch.no_grad()
    def logits(self, windows: torch.Tensor) -> torch.Tensor:
        """Centred logits, float32, shape (windows, CONTEXT, vocabulary)."""
        found = torch.cat([self.model(part).logits for part in windows.split(8)])
        return found - found.mean(-1, keepdim=True)

    @torch.no_grad()
    def continued(self, prompts: torch.Tensor, sample: bool) -> torch.Tensor:
        """The prompts and WRITTEN more tokens, greedy or sampled with fixed seeds."""
        torch.manual_seed(0)
        return self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=WRITTEN,
            min_new_tokens=WRITTEN,
            do_sample=sample,
            top_k=0,
            pad_token_id=0,
        )


def linear(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Replace transformers' Conv1D, a linear layer with a transposed weight, by nn.Linear."""
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, Conv1D):
                layer = nn.Linear(*child.weight.shape)
                layer.weight.data.copy_(child.weight.T)
                layer.bias.data.copy_(child.bias)
                setattr(parent, name, layer)
    return model


def _windows(tokenizer: Tokenizer, test: bool, count: int) -> torch.Tensor:
    """Windows evenly spread over the texts."""
    ids = torch.tensor([i for text in texts(test) for i in tokenizer.encode(f"{text}<|endoftext|>").ids])
    starts = torch.linspace(0, len(ids) - CONTEXT - 1, count).long()
    return ids[starts[:, None] + torch.arange(CONTEXT)]


def language(folder: Path, formats: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The unquantized model's row, then one row for each format and rounding."""
    text = Language(folder)
    exact = text.logits(text.test)
    prompts = text.test.reshape(-1, CONTEXT // 2)[:, :PROMPT]
    greedy = text.continued(prompts, sample=False)
    own = text.continued(prompts, sample=True)
    yield {"format": "fp16", "perplexity": perplexity(text.model, text.test.flatten()), "written": _written(text, own)}
    for name in formats:
        for rounding in ROUNDINGS:
            text.quantize(format_named(name), rounding)
            found = {"format": name, "rounding": rounding, **_predictions(text.logits(text.test), exact)}
            found["perplexity"] = perplexity(text.model, text.test.flatten())
            found["free"] = _first_difference(text.continued(prompts, sample=False), greedy)
            written = text.continued(prompts, sample=True)
            text.restore()
            yield {**found, "written": _written(text, written)}


def _predictions(logits: torch.Tensor, exact: torch.Tensor) -> Mapping[str, float]:
    error = (logits - exact).double().flatten(0, 1)
    power = error.square().sum(1).mean()
    rows = len(error)
    common = (rows * error.mean(0).square().sum() - power) / (rows - 1)  # minus the part of the mean that is noise
    kl = nn.functional.kl_div(logits.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    quarter = CONTEXT // 4
    return {
        "call": decibels(power / exact.double().square().sum(-1).mean()),
        "bias": float(common.clamp(min=0) / power),
        "KL": float(kl.mean()),
        "KL early": float(kl[:, :quarter].mean()),
        "KL late": float(kl[:, -quarter:].mean()),
        "agrees": float((logits.argmax(-1) == exact.argmax(-1)).float().mean()),
    }


def _first_difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The median number of tokens before the continuations differ; WRITTEN if they do not."""
    differ = found[:, PROMPT:] != exact[:, PROMPT:]
    first = torch.where(differ.any(1), differ.int().argmax(1), torch.tensor(WRITTEN))
    return float(first.float().median())


@torch.no_grad()
def _written(text: Language, tokens: torch.Tensor) -> float:
    """Perplexity of the continuations under the model as it is now."""
    losses = nn.functional.cross_entropy(
        text.model(tokens).logits[:, PROMPT - 1 : -1].flatten(0, 1), tokens[:, PROMPT:].flatten()
    )
    return math.exp(float(losses))


def language_blocks(folder: Path) -> dict[str, float]:
    """`why.injected.blocks` of the language model, on held-out text."""
    text = Language(folder)
    runs: list[Run] = [lambda part=part: text.logits(part) for part in text.test[: 6 * CALL_ROWS].split(CALL_ROWS)]
    with torch.no_grad():
        return blocks(text.model, runs)


def language_operators(folder: Path) -> dict[str, Any]:
    """`why.injected.operators` of the language model, which has linear layers only: the error of the logits in dB."""
    text = Language(folder)
    exact = text.logits(text.test)
    with noisy(text.layers):
        error = relative(text.logits(text.test), exact)
    return {"layers": "all", "weights": 1.0, "one call": decibels(error)}
