"""A Llama whose layers may differ in width: the class that every model of the workbook is an instance of.

The forward pass is Hugging Face's, unchanged. Only two things are new: the configuration checks head counts layer by
layer, and each decoder layer is built from its own entry of `config.per_layer_config`

    {"3": {"num_attention_heads": 24, "num_key_value_heads": 6, "intermediate_size": 336, "o_proj_bias": true}, …}

(transformers ≥ 5.15; layers that are not named have the global shape). `head_dim` is global and explicit. `o_proj_bias`
and `down_proj_bias` give these two projections a bias of their own: Llama's `attention_bias` and `mlp_bias` would give
one to q, k, v, gate and up as well.

This file imports nothing of gqalib: `save_pretrained` puts a copy beside the weights, so that
`AutoModelForCausalLM.from_pretrained(folder)` works on a machine without gqalib for whoever lets it run that copy.
"""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


@strict
class GqaLlamaConfig(LlamaConfig):
    """`LlamaConfig` with per-layer `num_attention_heads`, `num_key_value_heads`, `intermediate_size` and output
    biases."""

    model_type = "gqa_llama"
    o_proj_bias: bool = False  # what a mean correction adds after groups are gone
    down_proj_bias: bool = False  # the same after channels are gone

    def validate_architecture(self):
        """Each layer: whole groups, and something left of everything.

        Raises:
            ValueError: a layer has no KV head or channel, or its query heads do not divide into its KV heads.
        """
        for index, layer in enumerate(self.per_layer_config):
            heads, kv_heads, width = layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size
            if min(heads, kv_heads, width) < 1 or heads % kv_heads:
                raise ValueError(
                    f"layer {index} has {heads} query heads, {kv_heads} KV heads and {width} MLP channels: "
                    "each must be at least 1, and the query heads a multiple of the KV heads"
                )


def build_layer(config: GqaLlamaConfig, index: int) -> LlamaDecoderLayer:
    """A decoder layer from its own entry of `config.per_layer_config`: Llama's, with output biases where they are
    asked for."""
    layer = LlamaDecoderLayer(config, index)
    for block, name, wanted in (
        (layer.self_attn, "o_proj", config.o_proj_bias),
        (layer.mlp, "down_proj", config.down_proj_bias),
    ):
        linear = getattr(block, name)
        if wanted and linear.bias is None:
            setattr(block, name, nn.Linear(linear.in_features, linear.out_features))
    return layer


class GqaLlamaModel(LlamaModel):
    """`LlamaModel` with uneven layers: its constructor, but for the line that builds the layers."""

    config: GqaLlamaConfig

    def __init__(self, config: GqaLlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(build_layer(layer, i) for i, layer in enumerate(config.per_layer_config))
        for layer in self.layers:  # one config for all, so that set_attn_implementation reaches every layer
            layer.self_attn.config = config
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class GqaLlamaForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` over a `GqaLlamaModel`."""

    config: GqaLlamaConfig

    def __init__(self, config: GqaLlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = GqaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("gqa_llama", GqaLlamaConfig)
AutoModel.register(GqaLlamaConfig, GqaLlamaModel)
AutoModelForCausalLM.register(GqaLlamaConfig, GqaLlamaForCausalLM)
GqaLlamaConfig.register_for_auto_class()
GqaLlamaModel.register_for_auto_class("AutoModel")
GqaLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
