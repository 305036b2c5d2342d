"""Runs of affine operators of a traced network as one matrix each: fewer steps and tighter intervals."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lynceus.trust.bounds_ops import Convolution, Dense, Network, Node, Operator, Rearrange, Scale, View
from lynceus.trust.bounds_patch import has_windows

LARGE = 1 << 20  # entries of a matrix that affine operators are fused into


def fused(network: Network) -> Network:
    """Runs of affine operators as one matrix each, where it stays below `LARGE` entries."""
    nodes = network.nodes
    readers = [0] * len(nodes)
    for node in nodes:
        for i in node.inputs:
            readers[i] += 1
    chain: dict[int, tuple[int, list[int]]] = {}  # node -> where its run of affine operators starts, and the run
    for index, node in enumerate(nodes):
        if isinstance(node.op, (Dense, Convolution, Scale, Rearrange, View)):
            before = node.inputs[0]
            start, run = chain[before] if before in chain and readers[before] == 1 else (before, [])
            if nodes[start].size * node.size > LARGE:
                start, run = before, []
            chain[index] = (start, [*run, index])
    inner = {i for _, run in chain.values() for i in run[:-1]}
    place: dict[int, int] = {}
    out: list[Node] = []
    for index, node in enumerate(nodes):
        if index in inner:
            continue
        start, run = chain.get(index, (-1, [index]))
        joined: Operator | None = None
        if len(run) > 1 and all(isinstance(nodes[i].op, View) for i in run):
            joined = View(nodes[start].shape, node.shape)
        elif index in chain and nodes[start].size * node.size <= LARGE and _worth(nodes, run):
            joined = _matrix(network, start, run)
        if joined is not None:
            place[index] = len(out)
            out.append(Node(op=joined, inputs=(place[start],), shape=node.shape, layer=node.layer))
            continue
        for i in run:
            place[i] = len(out)
            inputs = tuple(place[j] for j in nodes[i].inputs)
            out.append(Node(op=nodes[i].op, inputs=inputs, shape=nodes[i].shape, layer=nodes[i].layer))
    return Network(nodes=out, name=network.name, device=network.device)


def _worth(nodes: Sequence[Node], run: Sequence[int]) -> bool:
    """A matrix is better than a single step that only picks or scales."""
    return any(isinstance(nodes[i].op, (Dense, Convolution)) for i in run)


def _matrix(network: Network, start: int, run: Sequence[int]) -> Dense:
    source, target = network.nodes[start], network.nodes[run[-1]]
    eye = torch.eye(source.size, dtype=torch.float64, device=network.device).reshape(source.size, *source.shape)
    x = torch.cat([eye, torch.zeros_like(eye[:1])])
    for index in run:
        x = network.nodes[index].op.run(x)
    flat = x.reshape(len(x), -1)
    dense = Dense((flat[:-1] - flat[-1:]).T.contiguous(), flat[-1].clone(), flat=(source.shape, target.shape))
    steps = [network.nodes[i] for i in run]
    if all(isinstance(n.op, (Convolution, Scale)) and has_windows(n.op) and len(n.shape) > 2 for n in steps):
        dense.steps = steps
    return dense
