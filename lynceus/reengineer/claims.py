"""What papers and repositories claim of the families that are reproduced here, for the model cards.

Parameter counts are those of the authors' code at 1000 classes; multiply-adds in units of 1e9 at the variant's own
image size; accuracy is ImageNet-1K top-1 in per cent, as published, trained on ImageNet-1K at that size.
"""

from __future__ import annotations

from typing import Any

UNMEASURED = "not measured: neither the published weights nor the ImageNet images are part of this project"
PROTOCOL = "ImageNet-1K validation, one centre crop at the model's size"

CLAIMS: dict[str, dict[str, Any]] = {
    "swin_v2": {
        "paper": "Swin Transformer V2: Scaling Up Capacity and Resolution, CVPR 2022, arXiv 2111.09883",
        "code": "microsoft/Swin-Transformer@f82860bfb522",
        "licence": "MIT",
        "counts": {
            "swinv2_tiny_patch4_window8_256": (28_347_154, 5.93),
            "swinv2_tiny_patch4_window16_256": (28_347_154, 6.60),
            "swinv2_small_patch4_window8_256": (49_728_418, 11.5),
            "swinv2_base_patch4_window8_256": (87_918_816, 20.3),
            "swinv2_base_patch4_window16_256": (87_918_816, 21.8),
            "swinv2_large_patch4_window12_192_22k": (196_739_932, None),
        },
        "macs_note": "claimed multiply-adds leave out the perceptron behind the position bias; ours count it",
        "metrics": {
            "swinv2_tiny_patch4_window8_256": 81.8,
            "swinv2_small_patch4_window8_256": 83.7,
            "swinv2_base_patch4_window8_256": 84.2,
            "swinv2_tiny_patch4_window16_256": 82.8,
            "swinv2_small_patch4_window16_256": 84.1,
            "swinv2_base_patch4_window16_256": 84.6,
        },
        "metrics_note": "the repository's table, at 256 px",
        "deviations": [
            "Images of any size: the authors' code asserts its size; here maps are padded to windows before they roll.",
            "The dense form is Swin's, made for V2 alike; the authors published none.",
            "A window of one cell gives zero coordinates where the reference divides by zero.",
            "Masks, coordinates and bias indices are made on demand; such buffers in a checkpoint are ignored.",
        ],
    },
    "cvt": {
        "paper": "CvT: Introducing Convolutions to Vision Transformers, ICCV 2021, arXiv 2103.15808",
        "code": "leoxiaobin/CvT@46ab3c832650",
        "licence": "MIT",
        "counts": {
            "cvt_13": (19_997_480, 4.57),
            "cvt_21": (31_622_696, 7.18),
            "cvt_13_384": (19_997_480, 16.27),
            "cvt_21_384": (31_622_696, 24.9),
            "cvt_w24": (277_196_392, 193.2),
        },
        "macs_note": "",
        "metrics": {"cvt_13": 81.6, "cvt_21": 82.5, "cvt_13_384": 83.0, "cvt_21_384": 83.3},
        "metrics_note": "the paper's table",
        "deviations": [
            "One picture keeps its batch axis; the reference drops it.",
            "A projection of three linear layers alone works; in the reference its queries are undefined.",
            "On a CPU in eval mode batch norms are folded into the depthwise convolutions; training is untouched.",
        ],
    },
    "vit": {
        "paper": "An Image is Worth 16x16 Words, ICLR 2021, arXiv 2010.11929; DeiT, ICML 2021, arXiv 2012.12877",
        "code": "huggingface/pytorch-image-models@aa4b5850c154",
        "licence": "Apache-2.0",
        "counts": {
            "vit_tiny": (5_717_416, 1.08),
            "vit_small": (22_050_664, 4.24),
            "vit_base": (86_567_656, 16.85),
            "vit_large": (304_326_632, None),
        },
        "macs_note": "claimed multiply-adds are those of the linear layers; ours count the attention products too",
        "metrics": {"vit_tiny": 72.2, "vit_small": 79.8, "vit_base": 81.8},
        "metrics_note": "DeiT recipe, as published with DeiT",
        "deviations": [
            "Images of any size: padded or with positions resized inside; the reference asserts its size unless told.",
            "Fused attention and, on a CPU in eval mode, fused linear kernels; the formula is the same.",
        ],
    },
    "resnet": {
        "paper": "Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385",
        "code": "torchvision 0.29.2",
        "licence": "BSD-3-Clause",
        "counts": {
            "resnet18": (11_689_512, 1.814),
            "resnet34": (21_797_672, 3.664),
            "resnet50": (25_557_032, 4.089),
        },
        "macs_note": "",
        "metrics": {"resnet18": 69.758, "resnet34": 73.314, "resnet50": 76.130},
        "metrics_note": "torchvision's V1 weights",
        "deviations": [
            "The stride of a bottleneck is on its 3x3 convolution (torchvision), not on the first 1x1 as in the paper.",
            "In eval mode batch normalisation is folded into the convolution before it; training is untouched.",
        ],
    },
    "convnext": {
        "paper": "A ConvNet for the 2020s, CVPR 2022, arXiv 2201.03545",
        "code": "facebookresearch/ConvNeXt@048efcea897d",
        "licence": "MIT",
        "counts": {
            "convnext_tiny": (28_589_128, 4.5),
            "convnext_small": (50_223_688, 8.7),
            "convnext_base": (88_591_464, 15.4),
            "convnext_large": (197_767_336, 34.4),
            "convnext_xlarge": (350_196_968, 60.9),
        },
        "macs_note": "claimed multiply-adds are rounded by the repository",
        "metrics": {"convnext_tiny": 82.1, "convnext_small": 83.1, "convnext_base": 83.8, "convnext_large": 84.3},
        "metrics_note": "the repository's averaged weights",
        "deviations": [
            "Maps are channels-last inside; the perceptron runs in pieces on a CPU; results agree.",
        ],
    },
    "swin": {
        "paper": "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, arXiv 2103.14030",
        "code": "microsoft/Swin-Transformer@f82860bfb522 (dense form: Swin-Transformer-Object-Detection@c7b20110addd)",
        "licence": "MIT (dense form: Apache-2.0)",
        "counts": {
            "swin_tiny_patch4_window7_224": (28_288_354, 4.49),
            "swin_small_patch4_window7_224": (49_606_258, 8.75),
            "swin_base_patch4_window7_224": (87_768_224, 15.44),
            "swin_large_patch4_window7_224": (196_532_476, 34.5),
        },
        "macs_note": "claimed multiply-adds are those that the authors' code counts",
        "metrics": {
            "swin_tiny_patch4_window7_224": 81.2,
            "swin_small_patch4_window7_224": 83.2,
            "swin_base_patch4_window7_224": 83.5,
        },
        "metrics_note": "the repository's table",
        "deviations": [
            "Images of any size: the classification code asserts its size; here maps are padded to windows.",
            "Masks and bias indices are built on demand instead of stored; such buffers in a checkpoint are ignored.",
        ],
    },
    "vim": {
        "paper": "Vision Mamba, ICML 2024, arXiv 2401.09417",
        "code": "hustvl/Vim@dd0358ad1e42",
        "licence": "Apache-2.0",
        "counts": {"vim_tiny": (7_148_008, None)},
        "macs_note": "no count is taken over; ours holds the scans with 9 operations per token, channel and state",
        "metrics": {
            "vim_tiny": 76.1,
            "vim_tiny_stride8": 78.3,
            "vim_small": 80.5,
            "vim_small_stride8": 81.6,
            "vim_base": 81.9,
        },
        "metrics_note": "the repository's table; stride 8 is fine-tuned from stride 16",
        "deviations": [
            "Images of any size, positions resized around the class token's row; the reference asserts its size.",
            "The scan is computed in chunks with a closed-form backward; the recurrence is the same.",
        ],
    },
    "plain_mamba": {
        "paper": "PlainMamba: Improving Non-hierarchical Mamba in Visual Recognition, BMVC 2024, arXiv 2403.17695",
        "code": "ChenhongyiYang/PlainMamba@0975a1d0d8bc",
        "licence": "Apache-2.0",
        "counts": {
            "plain_mamba_l1": (7_551_656, None),
            "plain_mamba_l2": (26_145_832, None),
            "plain_mamba_l3": (50_956_456, None),
        },
        "macs_note": "the repository rounds parameters to 7.3, 25.7 and 50.5 million and leaves something out",
        "metrics": {"plain_mamba_l1": 77.9, "plain_mamba_l2": 81.6, "plain_mamba_l3": 82.3},
        "metrics_note": "the repository's table",
        "deviations": [
            "As in the released code the step bias counts twice, and steps, B and C stay in raster order.",
            "The four sweeps run as one scan whose decays are made once.",
        ],
    },
    "hyena_vit": {
        "paper": "Multi-Dimensional Hyena for Spatial Inductive Bias, AISTATS 2024, arXiv 2309.13600",
        "code": "Itamarzimm/HyenaND@e8b875ea852b",
        "licence": "Apache-2.0",
        "counts": {"hyena_vit_tiny": (6_042_400, None)},
        "macs_note": "no count is published; ours holds the convolutions as they are run, by direct sums at this size",
        "metrics": {},
        "metrics_note": "no accuracy is claimed here: the paper's tables were not at hand",
        "deviations": [
            "The classifier reads the mean of the tokens; pool='token' reads the top left one, as the reference does.",
            "Images of any size, of unequal sides too: filters are made for the grid; the reference asserts its side.",
            "The filter's factor 1 / (2 L) is kept; with unequal sides L is their geometric mean.",
            "Filters are kept in eval mode; small maps are convolved directly instead of through the transform.",
        ],
    },
    "hornet": {
        "paper": "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions, NeurIPS 2022, "
        "arXiv 2207.14284",
        "code": "raoyongming/HorNet@ac9e21058935",
        "licence": "MIT",
        "counts": {
            "hornet_tiny_7x7": (22_409_512, 3.977),
            "hornet_tiny_gf": (22_991_848, 3.897),
            "hornet_small_7x7": (49_528_264, 8.826),
            "hornet_small_gf": (50_401_768, 8.707),
            "hornet_base_7x7": (87_256_680, 15.584),
            "hornet_base_gf": (88_421_352, 15.424),
            "hornet_large_7x7": (194_542_504, 34.821),
            "hornet_large_gf": (196_289_512, 34.582),
            "hornet_large_gf_img384": (201_806_824, 101.626),
        },
        "macs_note": "claimed multiply-adds include norms and leave out the Fourier transforms; ours reverse it",
        "metrics": {
            "hornet_tiny_7x7": 82.8,
            "hornet_tiny_gf": 83.0,
            "hornet_small_7x7": 83.8,
            "hornet_small_gf": 84.0,
            "hornet_base_7x7": 84.2,
            "hornet_base_gf": 84.3,
        },
        "metrics_note": "the repository's table",
        "deviations": [
            "Maps are channels-last inside, 1x1 convolutions are products, the gates' factor is taken on the kernel.",
            "The global filter keeps float64 and runs as real matrix products where a compiler or exporter looks.",
            "Extra-level convolutions of the detection pyramid, which cannot run in the authors' code, are left out.",
        ],
    },
    "spartan": {
        "paper": "SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition, IJCNN 2025, "
        "arXiv 2507.10999",
        "code": "henry-pay/SpaRTAN@1715a4308cba",
        "licence": "Apache-2.0",
        "counts": {"spartan_tiny": (3_820_296, 1.069)},
        "macs_note": "claimed multiply-adds are at 256 pixels and count norms (5 per number of a group norm, 2 of a "
        "batch norm) and means, 1.8% of all; ours leave them out",
        "metrics": {"spartan_tiny": 77.7},
        "metrics_note": "the paper's abstract",
        "deviations": [
            "Maps are channels-last inside and 1x1 convolutions are products; the rotation keeps float64.",
            "A map too small for the next 2x2 convolution is zero-padded to it.",
        ],
    },
    "convit": {
        "paper": "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, ICML 2021, "
        "arXiv 2103.10697",
        "code": "facebookresearch/convit@0a9340aaf50d",
        "licence": "Apache-2.0",
        "counts": {
            "convit_tiny": (5_710_512, None),
            "convit_small": (27_777_322, None),
            "convit_base": (86_540_040, None),
        },
        "macs_note": "",
        "metrics": {"convit_tiny": 73.116},
        "metrics_note": "the repository's table",
        "deviations": [
            "Images of any size and shape: the reference takes the square root of the number of patches as its grid.",
            "Positional attention is the product of one over rows and one over columns, made once per pass; the "
            "reference keeps a table of all pairs per layer and copies it to every image.",
            "The last division by the sum of attention, which is 1, is left out where the table is not made.",
        ],
    },
    "volo": {
        "paper": "VOLO: Vision Outlooker for Visual Recognition, TPAMI 2022, arXiv 2106.13112",
        "code": "sail-sg/volo@cf35775276a8 (labels: zihangJiang/TokenLabeling@9dbfd59aedec)",
        "licence": "Apache-2.0",
        "counts": {
            "volo_d1": (26_632_040, 6.92),
            "volo_d2": (58_678_336, 14.3),
            "volo_d3": (86_325_072, 20.7),
            "volo_d4": (192_961_520, None),
            "volo_d5": (295_455_584, None),
        },
        "macs_note": "claimed multiply-adds are those that the authors' code counts",
        "metrics": {"volo_d1": 84.2, "volo_d2": 85.2, "volo_d3": 85.4, "volo_d4": 85.7, "volo_d5": 86.1},
        "metrics_note": "with token labels, as published",
        "deviations": [
            "Images of any size: the reference adds a position table of one size; here it is resized bicubically.",
            "Stochastic depth in outlook blocks is an option; the reference never passes the rate on.",
            "Label maps are cropped with explicit (x1, y1, x2, y2); as published the label tools exchange the axes.",
            "The network gives logits in training too; the pair of logits that token labels need is `token_logits`.",
        ],
    },
    "lsnet": {
        "paper": "LSNet: See Large, Focus Small, CVPR 2025, arXiv 2503.23135",
        "code": "jameslahm/lsnet@cbe737c92b7c",
        "licence": "MIT",
        "counts": {
            "lsnet_t": (11_409_832, 0.3193),
            "lsnet_s": (16_146_304, 0.5434),
            "lsnet_b": (23_313_608, 1.2586),
        },
        "macs_note": "claimed multiply-adds are the authors' counter's, which takes a batch norm for two and a group "
        "norm for five per number; ours count products alone and are 1.1% lower, and equal in that convention",
        "metrics": {"lsnet_t": 74.9, "lsnet_s": 77.8, "lsnet_b": 80.3},
        "metrics_note": "without distillation; with it 76.1, 79.0, 81.6",
        "deviations": [
            "Images of any size: the bias table is resized to the map as the authors' loader would resize it.",
            "The bias is made from the table at use: the reference keeps a copy from when it entered eval mode, which "
            "weights loaded later do not change.",
            "The aggregation runs on any device, tap by tap; the reference has a GPU kernel alone.",
        ],
    },
    "resnas": {
        "paper": "Searching for Efficient Multi-Stage Vision Transformers, 2021, arXiv 2109.00642",
        "code": "yilunliao/vit-search@303e7c30638e",
        "licence": "non-commercial; no code of it is used",
        "counts": {
            "vit_res_tiny": (42_012_736, 1.7944),
            "resnas_tiny": (40_793_552, 1.7826),
            "resnas_small": (63_724_108, 2.8455),
            "resnas_medium": (96_442_672, 4.5131),
        },
        "macs_note": "claimed multiply-adds are those of the authors' counter, without the patch head",
        "metrics": {},
        "metrics_note": "no accuracy is claimed here: the paper's tables were not at hand",
        "deviations": [
            "Images of any size: padded to whole patches, an odd last row or column is halved alone; the reference "
            "takes squares of multiples of 56.",
            "In evaluation a distilled model gives the mean of its two heads; the reference gives both.",
            "Which networks of the super-network a batch runs is an argument, not a state of its layers.",
        ],
    },
    "halonet": {
        "paper": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021, arXiv 2103.12731",
        "code": "huggingface/pytorch-image-models@aa4b5850c154 (layer and hybrids; the authors published none), "
        "leondgarse/keras_cv_attention_models@02771fa52d43 (H0 to H7)",
        "licence": "Apache-2.0",
        "counts": {
            "halonet26t": (12_480_288, 3.17),
            "halonet50ts": (22_733_280, 5.27),
            "sehalonet33ts": (13_691_712, 3.53),
            "eca_halonext26ts": (10_756_885, 2.42),
            "halonet_h0": (5_502_248, None),
            "halonet_h1": (8_101_352, None),
            "halonet_h2": (9_405_608, None),
        },
        "macs_note": "claimed multiply-adds are at 256 pixels, counted on timm's nets",
        "metrics": {
            "halonet_h0": 77.9,
            "halonet_h1": 79.9,
            "halonet_h2": 80.4,
            "halonet_h3": 81.9,
            "halonet_h4": 83.3,
            "halonet_h5": 84.0,
            "halonet_h6": 84.4,
            "halonet_h7": 84.9,
        },
        "metrics_note": "the paper's figures at the table's image sizes",
        "deviations": [
            "Maps of any size: padded to whole blocks behind the projection, then cropped; the reference refuses them.",
            "Keys and values of a window are copied once per block; position terms of inference are made in pieces.",
            "The activation of H0 to H7 is settled by no source: ReLU, and an option.",
        ],
    },
    "sam_vit": {
        "paper": "Segment Anything, ICCV 2023, arXiv 2304.02643",
        "code": "facebookresearch/segment-anything; records of Expedit-LargeScale-Vision-Transformer/Expedit-SAM",
        "licence": "Apache-2.0",
        "counts": {
            "sam_vit_b": (89_670_912, None),
            "sam_vit_l": (308_278_272, None),
            "sam_vit_h": (637_026_048, None),
        },
        "macs_note": "",
        "metrics": {},
        "metrics_note": "an encoder of masks: the paper claims no accuracy of classification",
        "deviations": [
            "Any size: images are padded to whole patches, and both kinds of tables are resized; the reference takes "
            "the size that it was built for.",
            "Maps of the blocks in `levels` come before that of the neck, and a classifier on the neck's mean is an "
            "option; the reference gives the neck's map alone.",
            "init='scratch' is ours; tables of relative places start at zero in both.",
        ],
    },
    "soft": {
        "paper": "Softmax-free Linear Transformers, IJCV 2024, arXiv 2207.03341; SOFT, NeurIPS 2021, arXiv 2110.11945",
        "code": "fudan-zvg/SOFT@d3febc335775",
        "licence": "MIT",
        "counts": {
            "soft_tiny": (13_069_056, 2.22),
            "soft_small_code": (38_858_462, None),
            "soft_medium": (45_812_707, 9.07),
            "soft_large": (64_700_646, 13.7),
            "soft_huge": (87_108_273, 19.4),
        },
        "macs_note": "claimed multiply-adds are counted on the authors' code, which makes squares by products with "
        "ones and K A^+ before K' V; ours multiplies in the cheaper order, and the difference is accounted for in "
        "tests/backbones/soft_test.py",
        "metrics": {
            "soft_tiny": 79.3,
            "soft_small": 82.2,
            "soft_medium": 82.9,
            "soft_large": 83.1,
            "soft_huge": 83.3,
            "soft_norm_tiny": 79.4,
            "soft_norm_small": 82.4,
            "soft_norm_medium": 83.1,
            "soft_norm_large": 83.3,
            "soft_norm_huge": 83.4,
        },
        "metrics_note": "the repository's table; which of the two networks of the name Small it means is not known",
        "deviations": [
            "Small is two networks: the table's 24 million parameters, and the code's 38.9 (`soft_small_code`).",
            "SOFT++ starts Newton's method with a step per matrix; the reference takes one for the whole batch, so "
            "that images change each other where it does not converge (newton_step='batch' does the same).",
            "SOFT++ as published cannot be constructed (it names a class that does not exist); it is read as meant.",
            "A map smaller than a landmark's patch is padded to one landmark; the reference fails.",
        ],
    },
}
