"""The zoo's timm models: the smallest member or so of each architecture file, at 64 pixels.

The family is timm's own: the module that the model is defined in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._models import ZooModel, image_inputs, randomise
from ._torchvision import declare_operators

__all__ = ["MODELS"]

# Rows are family, model, image size in pixels; the tables differ in what the constructor accepts.
_PLAIN: tuple[tuple[str, str, int], ...] = (
    ("convmixer", "convmixer_768_32", 64),
    ("densenet", "densenet121", 64),
    ("densenet", "densenetblur121d", 64),
    ("dla", "dla46_c", 64),
    ("dla", "dla46x_c", 64),
    ("dpn", "dpn48b", 64),
    ("dpn", "dpn68", 64),
    ("efficientvit_mit", "efficientvit_b0", 64),
    ("ghostnet", "ghostnet_050", 64),
    ("ghostnet", "ghostnetv2_100", 64),
    ("ghostnet", "ghostnetv3_050", 64),
    ("hrnet", "hrnet_w18_small", 64),
    ("inception_resnet_v2", "inception_resnet_v2", 96),
    ("inception_v3", "inception_v3", 96),
    ("inception_v4", "inception_v4", 96),
    ("lcnetv2", "lcnetv2_base", 64),
    ("pnasnet", "pnasnet5large", 64),
    ("repghost", "repghostnet_050", 64),
    ("selecsls", "selecsls42", 64),
    ("senet", "legacy_seresnet18", 64),
    ("shvit", "shvit_s1", 64),
    ("xception", "legacy_xception", 64),
)
_SIZED: tuple[tuple[str, str, int], ...] = (
    ("efficientvit_msra", "efficientvit_m0", 64),
    ("repvit", "repvit_m0_9", 64),
)
_STOCHASTIC: tuple[tuple[str, str, int], ...] = (
    ("convnext", "convnext_atto", 64),
    ("convnext", "convnextv2_atto", 64),
    ("cpubone", "cpubone_t0", 64),
    ("crossvit", "crossvit_9_dagger_240", 64),
    ("crossvit", "crossvit_tiny_240", 64),
    ("csatv2", "csatv2", 64),
    ("cspnet", "cs3darknet_s", 64),
    ("cspnext", "cspnext_tiny", 64),
    ("davit", "davit_tiny", 64),
    ("edgenext", "edgenext_xx_small", 64),
    ("efficientnet", "efficientnet_b0", 64),
    ("efficientnet", "mixnet_s", 64),
    ("efficientnet", "mnasnet_small", 64),
    ("efficientnet", "mobilenet_edgetpu_v2_xs", 64),
    ("efficientnet", "mobilenetv2_035", 64),
    ("efficientnet", "tf_efficientnet_lite0", 64),
    ("efficientnet", "tinynet_e", 64),
    ("efficientvim", "efficientvim_m1", 64),
    ("fasternet", "fasternet_t0", 64),
    ("fastvit", "fastvit_sa12", 64),
    ("fastvit", "fastvit_t8", 64),
    ("focalnet", "focalnet_tiny_srf", 64),
    ("hardcorenas", "hardcorenas_a", 64),
    ("hgnet", "hgnetv2_b0", 64),
    ("hieradet_sam2", "sam2_hiera_tiny", 64),
    ("iformer", "iformer_t", 64),
    ("inception_next", "inception_next_atto", 64),
    ("lowformer", "lowformer_e1", 64),
    ("mambaout", "mambaout_femto", 64),
    ("metaformer", "caformer_s18", 64),
    ("metaformer", "convformer_s18", 64),
    ("metaformer", "poolformer_s12", 64),
    ("metaformer", "poolformerv2_s12", 64),
    ("mobilenetv3", "fbnetv3_b", 64),
    ("mobilenetv3", "lcnet_035", 64),
    ("mobilenetv3", "mobilenetv3_small_050", 64),
    ("mobilenetv3", "mobilenetv4_conv_small_035", 64),
    ("mobilenetv3", "mobilenetv4_hybrid_medium", 64),
    ("nextvit", "nextvit_small", 64),
    ("nfnet", "eca_nfnet_l0", 64),
    ("nfnet", "nfnet_l0", 64),
    ("pvt_v2", "pvt_v2_b0", 64),
    ("rdnet", "rdnet_tiny", 64),
    ("regnet", "regnetx_002", 64),
    ("regnet", "regnety_002", 64),
    ("res2net", "res2net50_14w_8s", 64),
    ("resnest", "resnest14d", 64),
    ("resnet", "ecaresnet26t", 64),
    ("resnet", "resnet10t", 64),
    ("resnet", "resnetblur18", 64),
    ("resnet", "resnetrs50", 64),
    ("resnetv2", "resnetv2_18", 64),
    ("resnetv2", "resnetv2_50x1_bit", 64),
    ("rexnet", "rexnet_100", 64),
    ("rexnet", "rexnetr_100", 64),
    ("sknet", "skresnet18", 64),
    ("starnet", "starnet_s1", 64),
    ("tiny_vit", "tiny_vit_5m_224", 64),
    ("tresnet", "tresnet_m", 64),
    ("vovnet", "ese_vovnet19b_slim", 64),
    ("vovnet", "vovnet39a", 64),
    ("xception_aligned", "xception41", 64),
)
_SIZED_STOCHASTIC: tuple[tuple[str, str, int], ...] = (
    ("beit", "beit_base_patch16_224", 64),
    ("byoanet", "botnet26t_256", 64),
    ("byoanet", "halonet26t", 256),
    ("byoanet", "lambda_resnet26t", 64),
    ("byoanet", "sebotnet33ts_256", 64),
    ("byobnet", "eca_resnet33ts", 64),
    ("byobnet", "gcresnet33ts", 64),
    ("byobnet", "gernet_s", 64),
    ("byobnet", "mobileone_s0", 64),
    ("byobnet", "regnetz_b16", 64),
    ("byobnet", "repvgg_a0", 64),
    ("cait", "cait_xxs24_224", 64),
    ("coat", "coat_lite_tiny", 64),
    ("convit", "convit_tiny", 64),
    ("deit", "deit_tiny_distilled_patch16_224", 64),
    ("deit", "deit_tiny_patch16_224", 64),
    ("efficientformer", "efficientformer_l1", 224),
    ("efficientformer_v2", "efficientformerv2_s0", 64),
    ("eva", "eva02_tiny_patch14_224", 64),
    ("eva", "vit_base_patch16_rope_reg1_gap_256", 64),
    ("eva", "vit_small_patch16_rope_224", 64),
    ("gcvit", "gcvit_xxtiny", 64),
    ("hiera", "hiera_tiny_224", 64),
    ("levit", "levit_128s", 64),
    ("levit", "levit_conv_128s", 64),
    ("maxxvit", "coatnet_nano_cc_224", 64),
    ("maxxvit", "coatnet_pico_rw_224", 64),
    ("maxxvit", "maxvit_rmlp_pico_rw_256", 64),
    ("maxxvit", "maxxvit_rmlp_nano_rw_256", 64),
    ("maxxvit", "test_coatnet", 64),
    ("maxxvit", "test_maxvit", 64),
    ("mlp_mixer", "gmlp_ti16_224", 64),
    ("mlp_mixer", "mixer_s32_224", 64),
    ("mlp_mixer", "resmlp_12_224", 64),
    ("mobilevit", "mobilevit_xxs", 64),
    ("mobilevit", "mobilevitv2_050", 64),
    ("mvitv2", "mvitv2_tiny", 64),
    ("nest", "nest_tiny", 64),
    ("pit", "pit_ti_224", 64),
    ("qwen3_vit", "qwen3_vit_88m", 64),
    ("sequencer", "sequencer2d_s", 64),
    ("swiftformer", "swiftformer_xs", 64),
    ("swin_transformer", "swin_tiny_patch4_window7_224", 64),
    ("swin_transformer_v2", "swinv2_tiny_window8_256", 64),
    ("swin_transformer_v2_cr", "swinv2_cr_tiny_224", 64),
    ("swin_transformer_v2_cr", "swinv2_cr_tiny_ns_224", 64),
    ("tnt", "tnt_s_patch16_224", 64),
    ("twins", "twins_pcpvt_small", 64),
    ("twins", "twins_svt_small", 64),
    ("visformer", "visformer_tiny", 64),
    ("vision_transformer", "test_vit", 64),
    ("vision_transformer", "vit_tiny_patch16_224", 64),
    ("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 64),
    ("vision_transformer_relpos", "vit_relpos_small_patch16_224", 64),
    ("vitamin", "vitamin_small_224", 64),
    ("volo", "volo_d1_224", 64),
    ("xcit", "xcit_nano_12_p8_224", 64),
)
# Arguments that make one model smaller than its family's smallest.
_REDUCED: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 3},
    "qwen3_vit_88m": {"depth": 3},
    "vit_base_patch16_rope_reg1_gap_256": {"depth": 3},
}
_CLASSES = 10
_DROP_PATH = 0.1


def _builder(name: str, size: int, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_operators()
        import timm

        torch.manual_seed(0)
        model: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=_CLASSES, **_REDUCED.get(name, {}), **arguments
        )
        return randomise(model, image_inputs(size)(4, 7))

    return build


def _models(
    rows: tuple[tuple[str, str, int], ...], *, sized: bool, stochastic: bool
) -> tuple[ZooModel, ...]:
    models = []
    for family, name, size in rows:
        arguments: dict[str, Any] = {"img_size": size} if sized else {}
        if stochastic:
            arguments["drop_path_rate"] = _DROP_PATH
        models.append(
            ZooModel("timm", name, family, _builder(name, size, arguments), image_inputs(size))
        )
    return tuple(models)


MODELS: tuple[ZooModel, ...] = (
    *_models(_PLAIN, sized=False, stochastic=False),
    *_models(_SIZED, sized=True, stochastic=False),
    *_models(_STOCHASTIC, sized=False, stochastic=True),
    *_models(_SIZED_STOCHASTIC, sized=True, stochastic=True),
)
