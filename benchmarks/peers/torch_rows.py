"""PyTorch at its best settings: fused AdamW, its own attention kernel, eager or compiled."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from problems import Problem
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))


def versions() -> dict[str, str]:
    return {"torch": torch.__version__}


def environment(row: str, variant: str) -> dict[str, str]:
    """Return what fnml's runs start with too, for the variants with their allocator."""
    return {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"} if "malloc" in variant else {}


def on_device(batches: list) -> list:
    return [tuple(_tensor(x) for x in batch) for batch in batches]


def value(loss: torch.Tensor) -> float:
    return loss.item()


def _tensor(x: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(x))
    return x.long() if x.dtype == torch.int32 else x


def _keep_memory() -> None:
    """Let glibc keep freed memory, as fnml's runs do."""
    libc = ctypes.CDLL(None)
    for option, wanted in ((-8, 1), (-3, 1 << 30), (-1, (1 << 31) - 1)):
        libc.mallopt(option, wanted)


def training(problem: Problem, model: nn.Module, variant: str) -> tuple[Any, Callable]:
    """Return the state and the step of a classifier.

    ``variant`` holds "compile" for torch.compile and "malloc" for an allocator that keeps memory.
    """
    if "malloc" in variant:
        _keep_memory()
    rate, b1, b2, eps, weight_decay = problem.adamw
    optimizer = torch.optim.AdamW(model.parameters(), rate, (b1, b2), eps, weight_decay, fused=True)
    called = torch.compile(model) if "compile" in variant else model

    def step(state: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        logits = called(batch[0])
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[1].reshape(-1))
        loss.backward()
        optimizer.step()
        return state, loss.detach()

    return None, step


def _load(module: nn.Module, **arrays: np.ndarray) -> nn.Module:
    """Set a module's own parameters; kernels [inputs, outputs] become torch's [outputs, inputs]."""
    if isinstance(module, nn.Linear):
        arrays["weight"] = arrays["weight"].T
    with torch.no_grad():
        for name, x in arrays.items():
            getattr(module, name).copy_(_tensor(x))
    return module


def dense(kernel: np.ndarray, bias: np.ndarray | None = None) -> nn.Module:
    layer = nn.Linear(*kernel.shape, bias=bias is not None)
    return _load(layer, weight=kernel, **({} if bias is None else {"bias": bias}))


def _layers(problem: Problem) -> list[dict[str, Any]]:
    def cut(tree: Any, i: int) -> Any:
        return {k: cut(x, i) for k, x in tree.items()} if isinstance(tree, dict) else tree[i]

    return [cut(problem.weights["layers"], i) for i in range(problem.config["layers"])]


class _Block(nn.Module):
    def __init__(self, config: dict, w: dict) -> None:
        super().__init__()
        D, self.heads = config["width"], config["heads"]
        self.norms = nn.ModuleList(
            _load(nn.RMSNorm(D, eps=1e-6), weight=w[name]["scale"])
            for name in ("attention_norm", "mlp_norm")
        )
        kernels = [w["attention"][name] for name in ("query", "key", "value")]
        self.heads_in = dense(np.concatenate(kernels, 1))
        self.out = dense(w["attention"]["out"])
        self.gate_up = dense(np.concatenate([w["mlp"]["gate"], w["mlp"]["up"]], 1))
        self.down = dense(w["mlp"]["down"])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = self.heads_in(self.norms[0](x)).chunk(3, -1)
        q, k, v = (a.view(B, T, self.heads, -1).transpose(1, 2) for a in (q, k, v))

        def rotate(a: torch.Tensor) -> torch.Tensor:
            low, high = a.chunk(2, -1)
            return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class _GPT(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        config, w = problem.config, problem.weights
        D, T = config["width"], config["context"]
        self.embed = _load(nn.Embedding(config["vocab"], D), weight=w["embed"]["table"])
        self.blocks = nn.ModuleList(_Block(config, layer) for layer in _layers(problem))
        self.norm = _load(nn.RMSNorm(D, eps=1e-6), weight=w["norm"]["scale"])
        self.head = dense(w["head"]["kernel"])
        half = D // config["heads"] // 2
        angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def _gpt(problem: Problem, variant: str) -> tuple[Any, Callable]:
    return training(problem, _GPT(problem), variant)


gpt_small = gpt_medium = _gpt


class _Layer(nn.Module):
    def __init__(self, config: dict, w: dict) -> None:
        super().__init__()
        self.heads = config["heads"]
        parts = [w["attention"][name] for name in ("query", "key", "value")]
        self.heads_in = dense(
            *(np.concatenate([p[n] for p in parts], -1) for n in ("kernel", "bias"))
        )
        self.out, self.up, self.down = (
            dense(p["kernel"], p["bias"])
            for p in (w["attention"]["out"], w["mlp"]["up"], w["mlp"]["down"])
        )
        self.norms = nn.ModuleList(norm(w[name]) for name in ("attention_norm", "mlp_norm"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = (
            a.view(B, T, self.heads, -1).transpose(1, 2) for a in self.heads_in(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        x = self.norms[0](x + self.out(y.transpose(1, 2).reshape(B, T, D)))
        return self.norms[1](x + self.down(F.gelu(self.up(x), approximate="tanh")))


def norm(w: dict[str, np.ndarray]) -> nn.Module:
    return _load(nn.LayerNorm(w["scale"].size, eps=1e-12), weight=w["scale"], bias=w["bias"])


class _Encoder(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        embed = problem.weights["embed"]
        self.tokens, self.types = (
            _load(nn.Embedding(*embed[name].shape), weight=embed[name])
            for name in ("token", "type")
        )
        self.position = nn.Parameter(_tensor(embed["position"]))
        self.norm = norm(embed["norm"])
        self.layers = nn.ModuleList(_Layer(problem.config, layer) for layer in _layers(problem))

    def forward(self, tokens: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.tokens(tokens) + self.types(types) + self.position)
        for layer in self.layers:
            x = layer(x)
        return x


def bert(problem: Problem, variant: str) -> tuple[Any, Callable]:
    if "malloc" in variant:
        _keep_memory()
    model = _Encoder(problem).eval()
    called = torch.compile(model) if "compile" in variant else model

    @torch.inference_mode()
    def step(state: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        tokens, types, probe = batch
        return state, (called(tokens, types) * probe).sum()

    return None, step


def digits_mlp(problem: Problem, variant: str) -> tuple[Any, Callable]:
    first, *others = (dense(**layer) for layer in problem.weights["layers"])
    layers = [x for layer in others for x in (nn.ReLU(), layer)]
    return training(problem, nn.Sequential(first, *layers), variant)


def _conv(kernel: np.ndarray, bias: np.ndarray | None = None, stride: int = 1) -> nn.Module:
    """Make a convolution of a kernel [h, w, C, F]."""
    size, _, inputs, outputs = kernel.shape
    around = size // 2 if stride == 1 else 0
    layer = nn.Conv2d(inputs, outputs, size, stride, around, bias=bias is not None)
    _load(layer, weight=kernel.transpose(3, 2, 0, 1), **({} if bias is None else {"bias": bias}))
    layer.to(memory_format=torch.channels_last)
    # With a stride of 2 and an even size, "SAME" adds its one row of zeros after the picture.
    return layer if around == size // 2 else nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), layer)


class _ChannelsFirst(nn.Module):
    """View [B, H, W, C] as [B, C, H, W] in PyTorch's memory format "channels_last"."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)


class _Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def cnn(problem: Problem, variant: str) -> tuple[Any, Callable]:
    layers: list[nn.Module] = [_ChannelsFirst()]
    for part in problem.weights["convolutions"]:
        layers += [_conv(**part), nn.ReLU(), nn.MaxPool2d(2)]
    first, last = (dense(**layer) for layer in problem.weights["layers"])
    return training(problem, nn.Sequential(*layers, _Flat(), first, nn.ReLU(), last), variant)


def _batch_norm(part: dict[str, np.ndarray]) -> nn.Module:
    return _load(nn.BatchNorm2d(part["scale"].size), weight=part["scale"], bias=part["bias"])


class _Residual(nn.Module):
    def __init__(self, w: dict[str, Any], stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(w["conv1"], stride=stride), _batch_norm(w["norm1"])
        self.conv2, self.norm2 = _conv(w["conv2"]), _batch_norm(w["norm2"])
        self.shortcut = nn.Identity()
        if "shortcut" in w:
            layers = _conv(w["shortcut"], stride=stride), _batch_norm(w["shortcut_norm"])
            self.shortcut = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def resnet(problem: Problem, variant: str) -> tuple[Any, Callable]:
    w = problem.weights
    layers = [_ChannelsFirst(), _conv(w["stem"]["conv"]), _batch_norm(w["stem"]["norm"]), nn.ReLU()]
    for i, stage in enumerate(w["stages"]):
        layers += [_Residual(block, 2 if i and not j else 1) for j, block in enumerate(stage)]
    return training(problem, nn.Sequential(*layers, _Mean(), dense(**w["head"])).train(), variant)
