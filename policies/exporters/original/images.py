"""Original layouts of transformers for images (diffusers/loaders/single_file_utils.py, read backwards)."""

from __future__ import annotations

from typing import Final

from bitpolicy.policies.exporters.original.layout import Family, within

_MLP_0_2 = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
_IN_OUT = {"linear_1": "in_layer", "linear_2": "out_layer"}
_IN_BOTH = {  # a block of Flux for text and image
    "attn.{to_q,to_k,to_v}": "img_attn.qkv",
    "attn.{add_q_proj,add_k_proj,add_v_proj}": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
_NORMS_IN_BOTH = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
}
_NORMS_IN_SINGLE = {
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
_FLUX_BLOCKS = {
    **within("transformer_blocks.*.", "double_blocks.*.", {**_IN_BOTH, **_NORMS_IN_BOTH}),
    "transformer_blocks.*.norm1.linear": "double_blocks.*.img_mod.lin",
    "transformer_blocks.*.norm1_context.linear": "double_blocks.*.txt_mod.lin",
    "transformer_blocks.*.ff.net.0.proj": "double_blocks.*.img_mlp.0",
    "transformer_blocks.*.ff.net.2": "double_blocks.*.img_mlp.2",
    "transformer_blocks.*.ff_context.net.0.proj": "double_blocks.*.txt_mlp.0",
    "transformer_blocks.*.ff_context.net.2": "double_blocks.*.txt_mlp.2",
    **within("single_transformer_blocks.*.", "single_blocks.*.", _NORMS_IN_SINGLE),
    "single_transformer_blocks.*.norm.linear": "single_blocks.*.modulation.lin",
    "single_transformer_blocks.*.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}": "single_blocks.*.linear1",
    "single_transformer_blocks.*.proj_out": "single_blocks.*.linear2",
}
_FLUX_ENDS = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}

FLUX: Final = Family(
    {
        **_FLUX_ENDS,
        **_FLUX_BLOCKS,
        **within("time_text_embed.timestep_embedder.", "time_in.", _IN_OUT),
        **within("time_text_embed.text_embedder.", "vector_in.", _IN_OUT),
        **within("time_text_embed.guidance_embedder.", "guidance_in.", _IN_OUT),
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    swapped=("norm_out.linear",),
    measured=("x_embedder", "context_embedder", "time_text_embed.text_embedder.linear_1"),
)

CHROMA: Final = Family(
    {
        **_FLUX_ENDS,
        **_FLUX_BLOCKS,
        "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
        "distilled_guidance_layer.norms.*.weight": "distilled_guidance_layer.norms.*.scale",
        **within("distilled_guidance_layer.layers.*.", "distilled_guidance_layer.layers.*.", _IN_OUT),
    },
    measured=("x_embedder", "context_embedder"),
)

FLUX_2: Final = Family(
    {
        **_FLUX_ENDS,
        **within("time_guidance_embed.timestep_embedder.", "time_in.", _IN_OUT),
        **within("time_guidance_embed.guidance_embedder.", "guidance_in.", _IN_OUT),
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        **within("transformer_blocks.*.", "double_blocks.*.", {**_IN_BOTH, **_NORMS_IN_BOTH}),
        "transformer_blocks.*.ff.linear_in": "double_blocks.*.img_mlp.0",
        "transformer_blocks.*.ff.linear_out": "double_blocks.*.img_mlp.2",
        "transformer_blocks.*.ff_context.linear_in": "double_blocks.*.txt_mlp.0",
        "transformer_blocks.*.ff_context.linear_out": "double_blocks.*.txt_mlp.2",
        **within("single_transformer_blocks.*.", "single_blocks.*.", _NORMS_IN_SINGLE),
        "single_transformer_blocks.*.attn.to_qkv_mlp_proj": "single_blocks.*.linear1",
        "single_transformer_blocks.*.attn.to_out": "single_blocks.*.linear2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    swapped=("norm_out.linear",),
    measured=("x_embedder", "context_embedder"),
)

SD_3: Final = Family(
    {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        **within("time_text_embed.timestep_embedder.", "t_embedder.", _MLP_0_2),
        **within("time_text_embed.text_embedder.", "y_embedder.", _MLP_0_2),
        **within(
            "transformer_blocks.*.",
            "joint_blocks.*.",
            {
                "norm1.linear": "x_block.adaLN_modulation.1",
                "norm1_context.linear": "context_block.adaLN_modulation.1",
                "attn.{to_q,to_k,to_v}": "x_block.attn.qkv",
                "attn.{add_q_proj,add_k_proj,add_v_proj}": "context_block.attn.qkv",
                "attn.norm_q": "x_block.attn.ln_q",
                "attn.norm_k": "x_block.attn.ln_k",
                "attn.norm_added_q": "context_block.attn.ln_q",
                "attn.norm_added_k": "context_block.attn.ln_k",
                "attn.to_out.0": "x_block.attn.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "attn2.{to_q,to_k,to_v}": "x_block.attn2.qkv",
                "attn2.norm_q": "x_block.attn2.ln_q",
                "attn2.norm_k": "x_block.attn2.ln_k",
                "attn2.to_out.0": "x_block.attn2.proj",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
            },
        ),
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    swapped=("norm_out.linear", "transformer_blocks.$.norm1_context.linear"),
    measured=("context_embedder", "time_text_embed.text_embedder.linear_1"),
)

AURA_FLOW: Final = Family(
    {
        "register_tokens": "register_tokens",
        "pos_embed.pos_embed": "positional_encoding",
        "pos_embed.proj": "init_x_linear",
        "context_embedder": "cond_seq_linear",
        **within("time_step_proj.", "t_embedder.", _MLP_0_2),
        **within(
            "joint_transformer_blocks.*.",
            "double_layers.*.",
            {
                "norm1.linear": "modX.1",
                "norm1_context.linear": "modC.1",
                "attn.to_q": "attn.w2q",
                "attn.to_k": "attn.w2k",
                "attn.to_v": "attn.w2v",
                "attn.to_out.0": "attn.w2o",
                "attn.add_q_proj": "attn.w1q",
                "attn.add_k_proj": "attn.w1k",
                "attn.add_v_proj": "attn.w1v",
                "attn.to_add_out": "attn.w1o",
                "ff.linear_1": "mlpX.c_fc1",
                "ff.linear_2": "mlpX.c_fc2",
                "ff.out_projection": "mlpX.c_proj",
                "ff_context.linear_1": "mlpC.c_fc1",
                "ff_context.linear_2": "mlpC.c_fc2",
                "ff_context.out_projection": "mlpC.c_proj",
            },
        ),
        **within(
            "single_transformer_blocks.*.",
            "single_layers.*.",
            {
                "norm1.linear": "modCX.1",
                "attn.to_q": "attn.w1q",
                "attn.to_k": "attn.w1k",
                "attn.to_v": "attn.w1v",
                "attn.to_out.0": "attn.w1o",
                "ff.linear_1": "mlp.c_fc1",
                "ff.linear_2": "mlp.c_fc2",
                "ff.out_projection": "mlp.c_proj",
            },
        ),
        "norm_out.linear": "modF.1",
        "proj_out": "final_linear",
    },
    swapped=("norm_out.linear",),
    measured=("context_embedder",),
)

PIXART: Final = Family(
    {
        "scale_shift_table": "final_layer.scale_shift_table",
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        **within("adaln_single.emb.timestep_embedder.", "t_embedder.", _MLP_0_2),
        **within("adaln_single.emb.resolution_embedder.", "csize_embedder.", _MLP_0_2),
        **within("adaln_single.emb.aspect_ratio_embedder.", "ar_embedder.", _MLP_0_2),
        "adaln_single.linear": "t_block.1",
        **within(
            "transformer_blocks.*.",
            "blocks.*.",
            {
                "scale_shift_table": "scale_shift_table",
                "attn1.{to_q,to_k,to_v}": "attn.qkv",
                "attn1.to_out.0": "attn.proj",
                "attn2.to_q": "cross_attn.q_linear",
                "attn2.{to_k,to_v}": "cross_attn.kv_linear",
                "attn2.to_out.0": "cross_attn.proj",
                "ff.net.0.proj": "mlp.fc1",
                "ff.net.2": "mlp.fc2",
            },
        ),
        "proj_out": "final_layer.linear",
    },
)

_LUMINA_ATTENTION = {
    "{to_q,to_k,to_v}": "qkv",
    "to_out.0": "out",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
_LUMINA_BLOCK = {
    **within("attn.", "attention.", _LUMINA_ATTENTION),
    "feed_forward.linear_*": "feed_forward.w*",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
    "norm2": "attention_norm2",
}
_LUMINA_MODULATED = {"norm1.linear": "adaLN_modulation.1", "norm1.norm": "attention_norm1"}

LUMINA_2: Final = Family(
    {
        "x_embedder": "x_embedder",
        "time_caption_embed.caption_embedder": "cap_embedder",
        **within("time_caption_embed.timestep_embedder.", "t_embedder.", _MLP_0_2),
        **within("layers.*.", "layers.*.", {**_LUMINA_BLOCK, **_LUMINA_MODULATED}),
        **within("noise_refiner.*.", "noise_refiner.*.", {**_LUMINA_BLOCK, **_LUMINA_MODULATED}),
        **within("context_refiner.*.", "context_refiner.*.", {**_LUMINA_BLOCK, "norm1": "attention_norm1"}),
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    },
    measured=("time_caption_embed.caption_embedder.1",),
)

Z_IMAGE: Final = Family(
    {
        **within("%.*.attention.", "%.*.attention.", _LUMINA_ATTENTION),
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1": "final_layer",
    },
    same=True,
    measured=("cap_embedder.1",),
)

QWEN_IMAGE: Final = Family(same=True, measured=("img_in",), marks={"zero_cond_t": "__index_timestep_zero__"})

HIDREAM: Final = Family(same=True)
