"""A Llama whose layers may differ in width: the class that every model of the workbook is an instance of.

The forward pass is Hugging Face's, unchanged. Only two things are new: the configuration checks head counts layer by
layer, and each decoder layer is built from its own entry of `config.per_layer_config`

    {"3": {"num_attention_heads": 24, "num_key_value_heads": 6, "intermediate_size": 336, "o_proj_bias": true}, …}

(transformers ≥ 5.15; layers that are not named have the global shape). `head_dim` is global and explicit. `o_proj_bias`
and `down_proj_bias` give these two projections a bias of their own: Llama's `attention_bias` and `mlp_bias` would give
one to q, k, v, gate and up as well. A layer with 0 query and 0 KV heads has no attention, and no norm before it.

This file imports nothing of gqalib: `save_pretrained` puts a copy beside the weights, so that
`AutoModelForCausalLM.from_pretrained(folder)` works on a machine without gqalib for whoever lets it run that copy.
"""

import copy

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
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
        """Each layer: whole groups or no attention, and at least one channel. One layer at least has attention.

        Raises:
            ValueError: a layer has no channel, or its query heads do not divide into its KV heads; no layer has
            attention.
        """
        layers = list(self.per_layer_config)
        for index, layer in enumerate(layers):
            heads, kv_heads, width = layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size
            if min(heads, kv_heads) < 0 or width < 1 or (heads % kv_heads or not heads if kv_heads else heads):
                raise ValueError(
                    f"layer {index} has {heads} query heads, {kv_heads} KV heads and {width} MLP channels: channels "
                    "must be at least 1, and the query heads a multiple of the KV heads, or both 0"
                )
        if not any(layer.num_key_value_heads for layer in layers):
            raise ValueError("no layer has attention: give one of them at least a query and a KV head")


class Skipped(nn.Module):  # no "…Attention": transformers would take it for one that has only one implementation
    """What stands in a layer whose attention is gone: no weights, no keys and values, nothing for the stream."""

    def forward(self, hidden_states: Tensor, **_) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None  # Llama's layer adds it: a scalar, so that no memory is written


def remove_attention(layer: LlamaDecoderLayer) -> None:
    """Take a layer's attention, and the norm that only attention reads."""
    layer.self_attn, layer.input_layernorm = Skipped(), nn.Identity()


def number_attentions(layers: nn.ModuleList) -> None:
    """Give each attention its place in the KV cache. Layers without attention have none: transformers reads the
    length of the text from place 0, which would stay empty."""
    attentions = [layer.self_attn for layer in layers if not isinstance(layer.self_attn, Skipped)]
    for place, attention in enumerate(attentions):
        attention.layer_idx = place


def build_layer(config: GqaLlamaConfig, index: int) -> LlamaDecoderLayer:
    """A decoder layer from its own entry of `config.per_layer_config`: Llama's, with output biases where they are
    asked for, or without attention."""
    if not config.num_key_value_heads:
        shape = copy.copy(config)
        shape.num_attention_heads = shape.num_key_value_heads = 1  # Llama's own divides by it
        layer = build_layer(shape, index)
        remove_attention(layer)
        return layer
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
        number_attentions(self.layers)
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

    def save_pretrained(self, *args, **kwargs):
        """As ever; config.json also names the class without a head, which vLLM builds. transformers adds this one."""
        self.config.auto_map = {"AutoModel": f"{__name__.split('.')[-1]}.{GqaLlamaModel.__name__}"}
        super().save_pretrained(*args, **kwargs)


AutoConfig.register("gqa_llama", GqaLlamaConfig)
AutoModel.register(GqaLlamaConfig, GqaLlamaModel)
AutoModelForCausalLM.register(GqaLlamaConfig, GqaLlamaForCausalLM)
GqaLlamaConfig.register_for_auto_class()
GqaLlamaModel.register_for_auto_class("AutoModel")
GqaLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
