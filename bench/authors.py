"""The authors' own code as peers, where somebody has put it: $LYNCEUS_PEERS/OWNER+NAME or $LYNCEUS_PEERS/NAME.

Nothing of it is copied or fetched here. A family adds a small function that imports the code from that folder and
builds the net, and one line in AUTHORS; where the folder is missing, the comparison is skipped and says so.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from bench.peers import Absent
from lynceus.backbones.resnas import FOUND, REFERENCE


@dataclass(frozen=True)
class Authored:
    """repository: "owner/name" on GitHub. load: (folder of the checkout, **options) -> the net, giving logits."""

    repository: str
    load: Callable[..., nn.Module]


def folder_of(repository: str) -> Path:
    """Where the checkout is; Absent when it is nowhere."""
    root = os.environ.get("LYNCEUS_PEERS")
    if not root:
        raise Absent(f"LYNCEUS_PEERS names no folder with a checkout of {repository}")
    owner, name = repository.split("/")
    for folder in (Path(root) / f"{owner}+{name}", Path(root) / name):
        if folder.is_dir():
            return folder
    raise Absent(f"no checkout of {repository} in $LYNCEUS_PEERS")


def author_model(name: str, **options: Any) -> nn.Module:
    """The authors' net with fresh weights; Absent when the code, or something that it needs, is not here."""
    authored = AUTHORS[name]
    folder = folder_of(authored.repository)
    try:
        return authored.load(folder, **options)
    except ImportError as error:
        raise Absent(f"the code of {authored.repository} needs something that is not here: {error}") from None


def imported(
    folder: Path, file: str, *, stand_ins: Mapping[str, Mapping[str, Any]] | None = None, relative: bool = False
) -> ModuleType:
    """The module in `folder/file`, with `folder` on the import path meanwhile.

    stand_ins: module name -> attributes, for imports that the net itself does not use (a logger, a registry).
    relative: the module imports its neighbours relatively.
    """
    path = folder / file
    if not path.is_file():
        raise Absent(f"{path.name} is not in the checkout {folder.name}")
    name = "_peer_" + "_".join(path.relative_to(folder).with_suffix("").parts)
    places = [str(path.parent)] if relative else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importing(folder, path.parent, stand_ins=stand_ins or {}):
        sys.modules[name] = module  # dataclasses and pickles look themselves up
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importing(*folders: Path, stand_ins: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    path, modules = list(sys.path), dict(sys.modules)
    sys.path[:0] = [str(f) for f in folders]
    for name, attributes in stand_ins.items():
        made = ModuleType(name)
        made.__path__ = []  # so that its submodules may be stood in for too
        vars(made).update(attributes)
        sys.modules[name] = made
    try:
        yield
    finally:
        sys.path[:] = path
        for name in stand_ins:
            sys.modules.pop(name, None)
            if name in modules:
                sys.modules[name] = modules[name]


# the loaders ----------------------------------------------------------------------------------------
def hyena_deit(folder: Path, *, depth: int = 12, dim: int = 192, heads: int = 3, **layer: Any) -> nn.Module:
    """timm's DeiT body without a class token, mean of the normed tokens, with the authors' layer for its attention."""
    import contextlib
    import io

    from timm.models.vision_transformer import VisionTransformer

    code = imported(folder, "pytorch-image-models/timm/models/layers/hyena2d.py")
    body = VisionTransformer(
        embed_dim=dim, depth=depth, num_heads=heads, class_token=False, global_pool="avg", fc_norm=False
    )
    for i, block in enumerate(body.blocks):
        mode = "seq" if i % 2 == 0 else "standard"
        with contextlib.redirect_stdout(io.StringIO()):
            made = code.HyenaOperator2d(dim, 14, hyena2d_filter=True, directional_mode=mode, **layer)
        for part in made.modules():  # positions and rates are no weights
            part._non_persistent_buffers_set.update(part._buffers)
        block.attn = made
    return body


def vim(folder: Path, *, dim: int = 192, depth: int = 24, **options: Any) -> nn.Module:
    """The authors' Vim, whose CUDA kernels are replaced by their own reference functions in plain PyTorch."""
    import timm.layers
    import torch
    import torch.nn.functional as F

    def causal_conv(x: Any, weight: Any, bias: Any, activation: str) -> Any:
        y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])
        return F.silu(y[..., : x.shape[-1]])

    empty: dict[str, Any] = {}
    scans = imported(
        folder / "mamba-1p1p1",
        "mamba_ssm/ops/selective_scan_interface.py",
        stand_ins={
            "causal_conv1d": {"causal_conv1d_fn": causal_conv},
            "causal_conv1d_cuda": empty,
            "selective_scan_cuda": empty,
        },
    )
    vars(scans)["selective_scan_fn"] = scans.selective_scan_ref

    def without_projection(xz: Any, *rest: Any, **named: Any) -> Any:
        identity = torch.eye(xz.shape[1] // 2, dtype=xz.dtype)
        *before, a, b, c, d = rest
        out = scans.mamba_inner_ref(xz, *before, identity, None, a, b, c, d, **named)
        return out.transpose(1, 2)

    kernels = {
        "selective_scan_fn": scans.selective_scan_ref,
        "mamba_inner_fn": scans.mamba_inner_ref,
        "bimamba_inner_fn": scans.bimamba_inner_ref,
        "mamba_inner_fn_no_out_proj": without_projection,
    }
    packages = {"causal_conv1d": {"causal_conv1d_fn": None, "causal_conv1d_update": None}, "mamba_ssm": empty}
    packages |= {"mamba_ssm.ops": empty, "mamba_ssm.ops.selective_scan_interface": kernels}
    mixer = imported(
        folder / "mamba-1p1p1",
        "mamba_ssm/modules/mamba_simple.py",
        stand_ins={
            **packages,
            "mamba_ssm.ops.triton": empty,
            "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": None},
            "mamba_ssm.ops.triton.layer_norm": {"RMSNorm": None, "layer_norm_fn": None, "rms_norm_fn": None},
        },
    )
    utilities = {"load_config_hf": None, "load_state_dict_hf": None}
    net = imported(
        folder / "vim",
        "models_mamba.py",
        stand_ins={
            "timm.models.registry": {"register_model": lambda f: f},
            "timm.models.layers": vars(timm.layers),
            "timm.models.vision_transformer": {"VisionTransformer": None, "_cfg": dict, "_load_weights": None},
            "mamba_ssm": empty,
            "mamba_ssm.modules": empty,
            "mamba_ssm.modules.mamba_simple": {"Mamba": mixer.Mamba},
            "mamba_ssm.utils": empty,
            "mamba_ssm.utils.generation": {"GenerationMixin": object},
            "mamba_ssm.utils.hf": utilities,
            "mamba_ssm.ops": empty,
            "mamba_ssm.ops.triton": empty,
            "mamba_ssm.ops.triton.layer_norm": {
                "RMSNorm": nn.RMSNorm,
                "layer_norm_fn": None,
                "rms_norm_fn": None,
            },
        },
    )
    options = {"fused_add_norm": False, "residual_in_fp32": False, "final_pool_type": "mean", **options}
    made: nn.Module = net.VisionMamba(embed_dim=dim, depth=depth, **options)
    return made


def plain_mamba(folder: Path, *, num_classes: int = 1000, reference: Any = None, **options: Any) -> nn.Module:
    """The authors' PlainMamba with a linear classifier on the mean token. Its scan is mamba_ssm's reference function,
    from a checkout of hustvl/Vim, whose copy is the same."""
    import torch
    import torch.nn.functional as F
    from timm.layers import DropPath, trunc_normal_

    if reference is None:
        file = "mamba-1p1p1/mamba_ssm/ops/selective_scan_interface.py"
        empty: dict[str, Any] = {}
        stand_ins = dict.fromkeys(("causal_conv1d_cuda", "selective_scan_cuda"), empty)
        stand_ins["causal_conv1d"] = {"causal_conv1d_fn": None}
        reference = imported(folder_of("hustvl/Vim"), file, stand_ins=stand_ins).selective_scan_ref

    class Corner(nn.Module):  # mmcv's padding of the right and lower edge
        def __init__(self, kernel_size: Any, stride: Any, dilation: Any, padding: str):
            super().__init__()
            self.stride = stride

        def get_pad_shape(self, size: Any) -> tuple[int, int]:
            return -size[0] % self.stride[0], -size[1] % self.stride[1]

        def forward(self, x: Any) -> Any:
            high, wide = self.get_pad_shape(x.shape[-2:])
            return F.pad(x, (0, wide, 0, high))

    def resize(table: Any, old: Any, new: Any, mode: str = "bicubic", num_extra_tokens: int = 0) -> Any:
        if tuple(old) == tuple(new):
            return table
        image = table.reshape(1, *old, -1).permute(0, 3, 1, 2)
        return F.interpolate(image, size=new, mode=mode, align_corners=False).flatten(2).transpose(1, 2)

    def norm_layer(cfg: Any, channels: int, postfix: Any = "") -> Any:
        return f"ln{postfix}", nn.LayerNorm(channels, eps=cfg.get("eps", 1e-5))

    class Module(nn.Module):  # mmcv's base class, without its initialisers
        def __init__(self, init_cfg: Any = None):
            super().__init__()

    class Registry:
        def register_module(self) -> Any:
            return lambda cls: cls

    def pair_of(value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    base: dict[str, dict[str, Any]] = {
        name: {}
        for name in (
            "mmcv", "mmcv.cnn.utils", "mmcv.runner", "mmcv.cnn.bricks", "mmcls", "mmcls.models",
            "mmcls.models.backbones", "mmcls.plain_mamba_dev", "mmcls.plain_mamba_dev.models",
            "mmcls.plain_mamba_dev.models.modules", "mmcls.plain_mamba_dev.models.plain_mamba", "mamba_ssm",
            "mamba_ssm.ops", "mamba_ssm.ops.triton",
        )
    }  # fmt: skip
    base |= {
        "mmcv.cnn": {"build_norm_layer": norm_layer, "build_conv_layer": None},
        "mmcv.cnn.utils.weight_init": {"trunc_normal_": trunc_normal_},
        "mmcv.cnn.bricks.transformer": {
            "build_dropout": lambda cfg: DropPath(cfg["drop_prob"]),
            "AdaptivePadding": Corner,
        },
        "mmcv.runner.base_module": {"ModuleList": nn.ModuleList, "BaseModule": Module},
        "mmcv.utils": {"to_2tuple": pair_of},
        "mmcls.models.builder": {"BACKBONES": Registry()},
        "mmcls.models.utils": {"resize_pos_embed": resize, "to_2tuple": pair_of},
        "mmcls.models.backbones.base_backbone": {"BaseBackbone": Module},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": reference},
        "mamba_ssm.ops.triton.layernorm": {"RMSNorm": functools.partial(nn.RMSNorm, eps=1e-5)},
    }
    root = "mmcls/plain_mamba_dev/models"
    embed = imported(folder, f"{root}/modules/patch_embed.py", stand_ins=base)
    layer = imported(folder, f"{root}/plain_mamba/plain_mamba_layer.py", stand_ins=base)
    base["mmcls.plain_mamba_dev.models.modules.patch_embed"] = {"ConvPatchEmbed": embed.ConvPatchEmbed}
    base["mmcls.plain_mamba_dev.models.plain_mamba.plain_mamba_layer"] = {"PlainMambaLayer": layer.PlainMambaLayer}
    code = imported(folder, f"{root}/plain_mamba/plain_mamba.py", stand_ins=base)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = code.PlainMamba(**{"arch": "L1", **options})
            self.head = nn.ModuleDict({"fc": nn.Linear(self.backbone.embed_dims, num_classes)})

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head["fc"](self.backbone(image)[0].mean(1))
            return out

    return Classifier()


def soft(folder: Path, *, name: str = "soft_tiny") -> nn.Module:
    """fudan-zvg/SOFT with its torch kernel; its demands for CUDA, and a misspelt class name, are edited in memory."""
    edits = {
        ".cuda()": "",
        " and mat.is_cuda": "",
        "if input_mat.is_cuda": "if True",
        "assert grad_output.is_cuda": "pass",
        "with torch.cuda.device_of(mat)": "if True",
        "grad_mat, None, None, None, None": "grad_mat, None",
        "super(SoftmaxFreeSymNormAttentionKernel": "super(SoftmaxFreeNormAttentionKernel",
        "from timm.models.layers": "from timm.layers",
        "from timm.models.registry import register_model": "register_model = lambda f: f",
    }

    def read(file: str, **stand_ins: Mapping[str, Any]) -> ModuleType:
        text = (folder / file).read_text(encoding="utf-8")
        for old, new in edits.items():
            text = text.replace(old, new)
        module = ModuleType(f"_peer_soft_{Path(file).stem}")
        with _importing(folder, stand_ins={k.replace("__", "."): v for k, v in stand_ins.items()}):
            exec(compile(text.replace("from .softmax", "from softmax"), file, "exec"), vars(module))
        return module

    inverse = read("SOFT/kernel/inverse.py")
    kernels: dict[str, Mapping[str, Any]] = {
        "SOFT": {},
        "SOFT__kernel": {},
        "SOFT__kernel__subtraction": {"subtraction_gaussian_kernel": None},
        "SOFT__kernel__inverse": vars(inverse),
    }
    blocks = read("models/softmax_free_transformer.py", **kernels)
    net = read("models/softmax_free_vision_transformer.py", cv2={}, softmax_free_transformer=vars(blocks))
    made: nn.Module = getattr(net, name)(kernel_method="torch")
    return made


def hornet(folder: Path, *, variant: str = "hornet_tiny_7x7", **options: Any) -> nn.Module:
    """A named net of the authors'; timm's old places of two helpers are stood in for."""
    import contextlib
    import io

    from timm.layers import DropPath, trunc_normal_

    layers = {"trunc_normal_": trunc_normal_, "DropPath": DropPath}
    stand_ins = {"timm.models.layers": layers, "timm.models.registry": {"register_model": lambda f: f}}
    code = imported(folder, "hornet.py", stand_ins=stand_ins)
    with contextlib.redirect_stdout(io.StringIO()):
        net: nn.Module = getattr(code, variant)(**options)
    return net


def spartan(folder: Path, **options: Any) -> nn.Module:
    """The published T."""
    code = imported(folder, "src/model/spartan.py", stand_ins={"omegaconf": {"DictConfig": dict}})
    published = {
        "num_layer": 4,
        "layer_depths": [3, 3, 12, 2],
        "expand_ratios": [4, 4, 2, 2],
        "dims": [64, 128, 256],
        "dropout": 0.1,
    }
    net: nn.Module = code.SpaRTAN(1000, **{**published, **options})
    return net


# name -> repository and loader, a line per net


def cvt(folder: Path, **options: Any) -> nn.Module:
    """CvT-13, or with `depth` another of its width."""
    import collections.abc

    import timm.layers

    old: dict[str, dict[str, Any]] = {"torch._six": {"container_abcs": collections.abc}}
    old["timm.models.layers"] = vars(timm.layers)
    code = imported(folder, "lib/models/cls_cvt.py", stand_ins=old, relative=True)
    stages = 3
    spec = {
        "NUM_STAGES": stages,
        "PATCH_SIZE": [7, 3, 3],
        "PATCH_STRIDE": [4, 2, 2],
        "PATCH_PADDING": [2, 1, 1],
        "DIM_EMBED": [64, 192, 384],
        "NUM_HEADS": [1, 3, 6],
        "DEPTH": [1, 2, 10],
        "MLP_RATIO": [4.0] * stages,
        "ATTN_DROP_RATE": [0.0] * stages,
        "DROP_RATE": [0.0] * stages,
        "DROP_PATH_RATE": [0.0] * stages,
        "QKV_BIAS": [True] * stages,
        "CLS_TOKEN": [False, False, True],
        "POS_EMBED": [False] * stages,
        "QKV_PROJ_METHOD": ["dw_bn"] * stages,
        "KERNEL_QKV": [3] * stages,
        "PADDING_KV": [1] * stages,
        "STRIDE_KV": [2] * stages,
        "PADDING_Q": [1] * stages,
        "STRIDE_Q": [1] * stages,
    }
    made: nn.Module = code.ConvolutionalVisionTransformer(
        act_layer=code.QuickGELU,
        norm_layer=functools.partial(code.LayerNorm, eps=1e-5),
        spec={**spec, **{k.upper(): v for k, v in options.items()}},
    )
    return made


def lsnet(folder: Path, *, variant: str = "lsnet_t") -> nn.Module:
    """The authors' LSNet, whose GPU kernel is replaced by nine shifted products in plain PyTorch."""
    import timm.layers
    import torch
    import torch.nn.functional as F

    class Shifts(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            n, c, height, width = x.shape
            padded, out = F.pad(x, (1, 1, 1, 1)), torch.zeros(())
            for t in range(9):
                part = padded[:, :, t // 3 : t // 3 + height, t % 3 : t % 3 + width]
                out = out + part.reshape(n, -1, w.shape[1], height, width) * w[:, None, :, t]
            return out.view(n, c, height, width)

    def build(cls: Any, name: str, pretrained: bool, default_cfg: Any, **options: Any) -> nn.Module:
        made: nn.Module = cls(**options)
        return made

    stand_ins: dict[str, dict[str, Any]] = {
        "timm.models.layers": vars(timm.layers),
        "timm.models.registry": {"register_model": lambda f: f},
        "timm.models.helpers": {"build_model_with_cfg": build},
        "_peer_model_lsnet.ska": {"SKA": Shifts},
    }
    net: nn.Module = getattr(imported(folder, "model/lsnet.py", stand_ins=stand_ins, relative=True), variant)()

    def renew(module: Any, *_: Any) -> None:
        """Their bias is copied when eval mode begins; weights that come later must be copied again, once."""
        module.ab = module.attention_biases.detach()[:, module.attention_bias_idxs]
        module.stale.remove()

    def settle() -> None:
        """Batch norms take the statistics that the weights give."""
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = 1.0
        with torch.no_grad():
            net.train()(torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(2)))
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = 0.1
        net.eval()

    vars(net)["settle"] = settle
    for module in net.modules():
        if hasattr(module, "attention_bias_idxs"):
            vars(module)["stale"] = module.register_forward_pre_hook(renew)
    return net


def vit_search(folder: Path, *, definition: str, size: int = 224) -> nn.Module:
    """The authors' ViT-Res after a definition of ours, on a CPU."""
    from unittest.mock import patch

    import timm.layers
    import torch

    from lynceus.backbones.resnas_definition import parse

    stand_ins: dict[str, dict[str, Any]] = {
        "timm.models.layers": vars(timm.layers),
        "timm.models.registry": {"register_model": lambda f: f},
        "timm.models.vision_transformer": {"PatchEmbed": timm.layers.PatchEmbed, "_cfg": dict},
    }
    code = imported(folder, "nets/vit_sr_supernet.py", stand_ins=stand_ins, relative=True)
    items = parse(definition).items()
    with patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        net: nn.Module = code.FlexibleDistillVisionTransformerSR(size, distill_token=False, network_def=items)
    return net


AUTHORS: dict[str, Authored] = {
    "cvt": Authored("leoxiaobin/CvT", cvt),
    "soft_tiny": Authored("fudan-zvg/SOFT", soft),
    "soft_norm_tiny": Authored("fudan-zvg/SOFT", functools.partial(soft, name="soft_norm_tiny")),
    "hyena_deit": Authored("Itamarzimm/HyenaND", hyena_deit),
    "vim": Authored("hustvl/Vim", vim),
    "plain_mamba": Authored("ChenhongyiYang/PlainMamba", plain_mamba),
    "hornet": Authored("raoyongming/HorNet", hornet),
    "spartan": Authored("henry-pay/SpaRTAN", spartan),
    "lsnet": Authored("jameslahm/lsnet", lsnet),
    "vit_res": Authored("yilunliao/vit-search", functools.partial(vit_search, definition=REFERENCE)),
    "resnas_tiny": Authored("yilunliao/vit-search", functools.partial(vit_search, definition=FOUND["tiny"])),
}
