"""Original layouts of transformers for videos, and of images by the same code (diffusers/loaders/single_file_utils.py
and diffusers' scripts/convert_hunyuan_*.py, read backwards)."""

from __future__ import annotations

from typing import Final

from bitpolicy.policies.exporters.original.layout import Family, within

_MLP_0_2 = {"linear_1": "mlp.0", "linear_2": "mlp.2"}

_WAN_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
}
_WAN_BLOCK = {
    **within("attn1.", "self_attn.", _WAN_ATTENTION),
    **within("attn2.", "cross_attn.", _WAN_ATTENTION),
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}

WAN: Final = Family(
    {
        "patch_embedding": "patch_embedding",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        **within("blocks.*.", "blocks.*.", _WAN_BLOCK),
        "vace_patch_embedding": "vace_patch_embedding",
        **within("vace_blocks.*.", "vace_blocks.*.", _WAN_BLOCK),
        "vace_blocks.*.proj_in": "vace_blocks.*.before_proj",
        "vace_blocks.*.proj_out": "vace_blocks.*.after_proj",
        "proj_out": "head.head",
        "scale_shift_table": "head.modulation",
    },
)

LTX: Final = Family(
    {
        "proj_in": "patchify_proj",
        "time_embed": "adaln_single",
        "transformer_blocks.*.%.norm_q": "transformer_blocks.*.%.q_norm",
        "transformer_blocks.*.%.norm_k": "transformer_blocks.*.%.k_norm",
    },
    same=True,
    measured=("transformer_blocks.0.attn2.to_k",),
)

LTX_2: Final = Family(
    {
        **LTX.rules,
        "audio_proj_in": "audio_patchify_proj",
        "audio_time_embed": "audio_adaln_single",
        "prompt_adaln": "prompt_adaln_single",
        "audio_prompt_adaln": "audio_prompt_adaln_single",
        "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
        "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
        "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
        "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
        "transformer_blocks.*.video_a2v_cross_attn_scale_shift_table": (
            "transformer_blocks.*.scale_shift_table_a2v_ca_video"
        ),
        "transformer_blocks.*.audio_a2v_cross_attn_scale_shift_table": (
            "transformer_blocks.*.scale_shift_table_a2v_ca_audio"
        ),
    },
    same=True,
    measured=LTX.measured,
)

_HUNYUAN_REFINERS = "txt_in.individual_token_refiner.blocks.*."
_HUNYUAN_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "norm_out.linear": "adaLN_modulation.1",
    "attn.{to_q,to_k,to_v}": "self_attn_qkv",
    "attn.to_out.0": "self_attn_proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_HUNYUAN_DOUBLE = {
    "norm1.linear": "img_mod.linear",
    "norm1_context.linear": "txt_mod.linear",
    "attn.{to_q,to_k,to_v}": "img_attn_qkv",
    "attn.norm_q": "img_attn_q_norm",
    "attn.norm_k": "img_attn_k_norm",
    "attn.to_out.0": "img_attn_proj",
    "attn.{add_q_proj,add_k_proj,add_v_proj}": "txt_attn_qkv",
    "attn.norm_added_q": "txt_attn_q_norm",
    "attn.norm_added_k": "txt_attn_k_norm",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp.fc1",
    "ff.net.2": "img_mlp.fc2",
    "ff_context.net.0.proj": "txt_mlp.fc1",
    "ff_context.net.2": "txt_mlp.fc2",
}
_HUNYUAN_SINGLE = {
    "norm.linear": "modulation.linear",
    "{attn.to_q,attn.to_k,attn.to_v,proj_mlp}": "linear1",
    "attn.norm_q": "q_norm",
    "attn.norm_k": "k_norm",
    "proj_out": "linear2",
}
_HUNYUAN = {
    "x_embedder.proj": "img_in.proj",
    "context_embedder.proj_in": "txt_in.input_embedder",
    **within("context_embedder.time_text_embed.timestep_embedder.", "txt_in.t_embedder.", _MLP_0_2),
    "context_embedder.time_text_embed.text_embedder": "txt_in.c_embedder",
    **within("context_embedder.token_refiner.refiner_blocks.*.", _HUNYUAN_REFINERS, _HUNYUAN_REFINER),
    **within("transformer_blocks.*.", "double_blocks.*.", _HUNYUAN_DOUBLE),
    **within("single_transformer_blocks.*.", "single_blocks.*.", _HUNYUAN_SINGLE),
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_HUNYUAN_BYT5 = {
    "context_embedder_2.norm": "byt5_in.layernorm",
    "context_embedder_2.linear_*": "byt5_in.fc*",
}

HUNYUAN_VIDEO: Final = Family(
    {
        **_HUNYUAN,
        **within("time_text_embed.timestep_embedder.", "time_in.", _MLP_0_2),
        **within("time_text_embed.guidance_embedder.", "guidance_in.", _MLP_0_2),
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    },
    swapped=("norm_out.linear",),
    measured=("context_embedder.proj_in",),
)

HUNYUAN_IMAGE: Final = Family(
    {
        **_HUNYUAN,
        **_HUNYUAN_BYT5,
        **within("time_guidance_embed.timestep_embedder.", "time_in.", _MLP_0_2),
        **within("time_guidance_embed.timestep_embedder_r.", "time_r_in.", _MLP_0_2),
        **within("time_guidance_embed.guidance_embedder.", "guidance_in.", _MLP_0_2),
    },
    swapped=("norm_out.linear",),
    measured=("context_embedder.proj_in",),
)

HUNYUAN_VIDEO_15: Final = Family(
    {
        **_HUNYUAN,
        **_HUNYUAN_BYT5,
        **within("time_embed.timestep_embedder.", "time_in.", _MLP_0_2),
        **within("time_embed.timestep_embedder_r.", "time_r_in.", _MLP_0_2),
        "image_embedder.norm_in": "vision_in.proj.0",
        "image_embedder.linear_1": "vision_in.proj.1",
        "image_embedder.linear_2": "vision_in.proj.3",
        "image_embedder.norm_out": "vision_in.proj.4",
        "cond_type_embed": "cond_type_embedding",
    },
    swapped=("norm_out.linear",),
    measured=("context_embedder.proj_in",),
)

_COSMOS_ENDS = {
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder": "t_embedder.1",
    "proj_out": "final_layer.linear",
}

COSMOS_1: Final = Family(
    {
        **_COSMOS_ENDS,
        "learnable_pos_embed": "extra_pos_embedder",
        "time_embed.norm": "affline_norm",
        "norm_out.linear_*": "final_layer.adaLN_modulation.*",
        **within(
            "transformer_blocks.*.",
            "blocks.block*.",
            {
                **{
                    f"attn{i + 1}.{name}": f"blocks.{i}.block.attn.{place}"
                    for i in (0, 1)
                    for name, place in {
                        "to_q": "to_q.0",
                        "norm_q": "to_q.1",
                        "to_k": "to_k.0",
                        "norm_k": "to_k.1",
                        "to_v": "to_v.0",
                        "to_out.0": "to_out.0",
                    }.items()
                },
                **{f"norm{i + 1}.linear_*": f"blocks.{i}.adaLN_modulation.*" for i in (0, 1, 2)},
                "ff.net.0.proj": "blocks.2.block.layer1",
                "ff.net.2": "blocks.2.block.layer2",
            },
        ),
    },
    measured=("patch_embed.proj",),
)

_COSMOS_2_ATTENTION = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out.0": "output_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}

COSMOS_2: Final = Family(
    {
        **_COSMOS_ENDS,
        "time_embed.norm": "t_embedding_norm",
        "norm_out.linear_*": "final_layer.adaln_modulation.*",
        **within("transformer_blocks.*.attn1.", "blocks.*.self_attn.", _COSMOS_2_ATTENTION),
        **within("transformer_blocks.*.attn2.", "blocks.*.cross_attn.", _COSMOS_2_ATTENTION),
        "transformer_blocks.*.norm1.linear_*": "blocks.*.adaln_modulation_self_attn.*",
        "transformer_blocks.*.norm2.linear_*": "blocks.*.adaln_modulation_cross_attn.*",
        "transformer_blocks.*.norm3.linear_*": "blocks.*.adaln_modulation_mlp.*",
        "transformer_blocks.*.ff.net.0.proj": "blocks.*.mlp.layer1",
        "transformer_blocks.*.ff.net.2": "blocks.*.mlp.layer2",
    },
    measured=("patch_embed.proj",),
)

MOCHI: Final = Family(
    {
        "pos_frequencies": "pos_frequencies",
        "patch_embed.proj": "x_embedder.proj",
        **within("time_embed.timestep_embedder.", "t_embedder.", _MLP_0_2),
        "time_embed.pooler": "t5_y_embedder",
        "time_embed.caption_proj": "t5_yproj",
        **within(
            "transformer_blocks.*.",
            "blocks.*.",
            {
                "norm1.linear": "mod_x",
                "norm1_context.linear": "mod_y",
                "norm1_context.linear_1": "mod_y",
                "attn1.{to_q,to_k,to_v}": "attn.qkv_x",
                "attn1.{add_q_proj,add_k_proj,add_v_proj}": "attn.qkv_y",
                "attn1.norm_q": "attn.q_norm_x",
                "attn1.norm_k": "attn.k_norm_x",
                "attn1.norm_added_q": "attn.q_norm_y",
                "attn1.norm_added_k": "attn.k_norm_y",
                "attn1.to_out.0": "attn.proj_x",
                "attn1.to_add_out": "attn.proj_y",
                "ff.net.0.proj": "mlp_x.w1",
                "ff.net.2": "mlp_x.w2",
                "ff_context.net.0.proj": "mlp_y.w1",
                "ff_context.net.2": "mlp_y.w2",
            },
        ),
        "norm_out.linear": "final_layer.mod",
        "proj_out": "final_layer.linear",
    },
    swapped=("norm_out.linear", "transformer_blocks.*.ff.net.0.proj", "transformer_blocks.*.ff_context.net.0.proj"),
)
