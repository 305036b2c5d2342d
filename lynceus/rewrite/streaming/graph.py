"""Graph convolution over joints, and what leads into and out of it, as modules of clips and nodes of streams."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.layers.fused import fusable
from lynceus.rewrite.streaming.kernels import Watch
from lynceus.rewrite.streaming.node import PerFrame
from lynceus.rewrite.streaming.pointwise import BatchNormNode


class GraphConv(nn.Module):
    """relu(bn(sum over k of conv_k(x A_k)) + residual(x)) on (b, c, t, v); A (k, v, v) times a learned mask."""

    def __init__(self, inputs: int, outputs: int, graph: Float[Tensor, "k v v"]):
        super().__init__()
        self.graph_attn = nn.Parameter(torch.ones_like(graph))
        self.A = nn.Parameter(graph.clone(), requires_grad=False)
        self.g_conv = nn.ModuleList(nn.Conv2d(inputs, outputs, 1) for _ in range(len(graph)))
        self.gcn_residual: nn.Module | None = None
        if inputs != outputs:
            self.gcn_residual = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))
            nn.init.kaiming_normal_(self.gcn_residual[0].weight, mode="fan_out")  # type: ignore[arg-type]
            nn.init.zeros_(self.gcn_residual[0].bias)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.bn.weight, 1e-6)  # begins as its residual
        for conv in self.g_conv:
            nn.init.normal_(conv.weight, 0, (2 / (conv.weight.numel() * len(graph))) ** 0.5)  # type: ignore[operator, arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b c t v"]) -> Float[Tensor, "b d t v"]:
        y = self.bn(self.mixed(x, self.weight(), 2))
        y = y + (x if self.gcn_residual is None else self.gcn_residual(x))
        return F.relu(y)

    def weight(self) -> tuple[Tensor, Tensor]:
        """The convolutions side by side, (d, k c), and the sum of their biases."""
        kernels = torch.cat([c.weight.flatten(1) for c in self.g_conv], 1)  # type: ignore[operator]
        return kernels, torch.stack([c.bias for c in self.g_conv]).sum(0)  # type: ignore[misc]

    def mixed(self, x: Tensor, kernel: tuple[Tensor, Tensor], free: int) -> Tensor:
        """The sum of the convolutions; free: axes behind the channels."""
        graph = self.A * self.graph_attn
        spread = torch.cat([x @ a for a in graph], 1)
        weight, bias = kernel
        y: Tensor = (F.conv2d if free == 2 else F.conv1d)(spread, weight[(..., *[None] * free)], bias)
        return y

    def stream_node(self, name: str) -> GraphNode:
        return GraphNode(name, self)


class GraphNode(PerFrame):
    """A graph convolution on a frame (b, c, v)."""

    def __init__(self, name: str, module: GraphConv):
        super().__init__(name)
        self.module = module
        self.inner = list(module.modules())
        self.watch = Watch()
        self.folded: tuple[Tensor, Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> GraphNode:
        made = GraphNode(self.name, copy.deepcopy(self.module, memo))
        made.enters, made.leaves = self.enters, self.leaves
        return made

    def run(self, x: Tensor) -> Tensor:
        m = self.module
        fast = self._fast(x)
        if fast is not None:
            return fast
        y = BatchNormNode("bn", m.bn).run(m.mixed(x, m.weight(), 1))
        if m.gcn_residual is None:
            return F.relu(y + x)
        conv, norm = m.gcn_residual[0], m.gcn_residual[1]  # type: ignore[index]
        short = F.conv1d(x, conv.weight.squeeze(-1), conv.bias)
        return F.relu(y + BatchNormNode("bn", norm).run(short))

    def _fast(self, x: Tensor) -> Tensor | None:
        """Without gradients on a CPU: norm, biases and residual inside two products, channels last."""
        m = self.module
        if not fusable(x) or x.dtype != torch.float32:
            return None
        if not self.watch.holds():
            self.watch, self.folded = Watch(self.inner, self.inner), None
            if self.watch.of(x.dtype):
                with torch.inference_mode(False), torch.no_grad():
                    self.folded = self._fold()
        if self.folded is None or self.watch.hooked():
            return None
        graph, weight, bias = self.folded
        rows = x.transpose(1, 2)  # b, v, c
        # graph is (v k, v): its product is already (b, v, k c)
        spread = torch.matmul(graph, rows).reshape(rows.shape[0] * rows.shape[1], -1)
        y = torch.addmm(bias, spread, weight)
        if m.gcn_residual is None:
            y += rows.reshape(y.shape)
        return y.relu_().view(rows.shape[0], rows.shape[1], -1).transpose(1, 2)

    def _fold(self) -> tuple[Tensor, Tensor, Tensor]:
        m = self.module
        kernel, bias = (t.double() for t in m.weight())
        kernel, bias = _scaled(kernel, bias, m.bn)
        graph = (m.A * m.graph_attn).double()
        v = graph.shape[1]
        parts = [graph]
        if m.gcn_residual is not None:  # one more partition: the joint itself
            conv, norm = m.gcn_residual[0], m.gcn_residual[1]  # type: ignore[index]
            more, shift = _scaled(conv.weight.flatten(1).double(), conv.bias.double(), norm)
            kernel, bias = torch.cat([kernel, more], 1), bias + shift
            parts.append(torch.eye(v, dtype=graph.dtype, device=graph.device)[None])
        # x A_k is taken from the left here: entry (w, k), v of the matrix is A_k[v, w]
        joined = torch.cat(parts).permute(2, 0, 1).reshape(-1, v)
        return joined.float().contiguous(), kernel.t().float().contiguous(), bias.float()

    def describe(self) -> str:
        m = self.module
        return f"Graph({tuple(m.A.shape)},{m.g_conv[0].in_channels},{m.g_conv[0].out_channels})"


def _scaled(weight: Tensor, bias: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight (o, i) and bias, with the batch norm behind them."""
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return weight * scale[:, None], (bias - norm.running_mean.double()) * scale + norm.bias.double()


class JointsIn(nn.Module):
    """Joints (b, c, t, v, s) through a batch norm over all their coordinates: (b s, c, t, v)."""

    rank_after = 4

    def __init__(self, features: int, skeletons: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.skeletons = skeletons

    def forward(self, x: Float[Tensor, "b c t v s"]) -> Float[Tensor, "n c t v"]:
        b, c, t, v, s = x.shape
        flat = x.permute(0, 2, 4, 3, 1).reshape(b * t, s * v * c)
        y = self.norm(flat).view(b, t, s, v, c)
        return y.permute(0, 2, 4, 1, 3).reshape(b * s, c, t, v)

    def stream_node(self, name: str) -> JointsInNode:
        return JointsInNode(name, self)


class JointsInNode(PerFrame):
    """The same on a frame (b, c, v, s): (b s, c, v)."""

    def __init__(self, name: str, module: JointsIn):
        super().__init__(name)
        self.module = module

    def run(self, x: Tensor) -> Tensor:
        b, c, v, s = x.shape
        norm = BatchNormNode("norm", self.module.norm)
        y = norm.run(x.permute(0, 3, 2, 1).reshape(b, s * v * c)).view(b * s, v, c)
        return y.transpose(1, 2)

    def describe(self) -> str:
        return f"JointsIn({self.module.norm.num_features},{self.module.skeletons})"


class JointsOut(nn.Module):
    """The mean over joints and skeletons: (b s, c, t, v) to (b, c, t)."""

    rank_after = 3

    def __init__(self, skeletons: int):
        super().__init__()
        self.skeletons = skeletons

    def forward(self, x: Float[Tensor, "n c t v"]) -> Float[Tensor, "b c t"]:
        return x.mean(3).unflatten(0, (-1, self.skeletons)).mean(1)

    def stream_node(self, name: str) -> JointsOutNode:
        return JointsOutNode(name, self)


class JointsOutNode(PerFrame):
    """The same on a frame."""

    def __init__(self, name: str, module: JointsOut):
        super().__init__(name)
        self.module = module

    def run(self, x: Tensor) -> Tensor:
        return x.mean(2).unflatten(0, (-1, self.module.skeletons)).mean(1)

    def describe(self) -> str:
        return f"JointsOut({self.module.skeletons})"
