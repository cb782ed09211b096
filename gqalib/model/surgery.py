"""Cutting a layer to some of its groups and channels, and dropping layers or their attention whole: weights, module
sizes and config change together.

Nothing here knows why a group goes. After every call the model runs, saves and loads.

    group g of a 4:1 layer          rows of q_proj            row block of k_proj, v_proj      columns of o_proj
    one KV head, 4 query heads      heads 4g … 4g+3           head g                           heads 4g … 4g+3
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.model.modeling_gqa_llama import number_attentions, remove_attention
from gqalib.model.shapes import attention_of, decoder_layers, has_attention, layer_shape


def keep_groups(model: nn.Module, layer_index: int, groups: Sequence[int]) -> None:
    """Keep these GQA groups (KV heads with their query heads) of a layer, in ascending order, and drop the rest.

    Raises:
        InputError: layer or group out of range, a group named twice, no group left, or a layer without attention.
    """
    layer = _layer(model, layer_index)
    attention = attention_of(layer)
    groups = _checked(groups, layer_shape(layer)["num_key_value_heads"], "group", layer_index)
    query_rows = _query_rows(layer, groups)
    kv_rows = rows_of_heads(groups, attention.head_dim)
    _keep_rows(attention.q_proj, query_rows)
    _keep_rows(attention.k_proj, kv_rows)
    _keep_rows(attention.v_proj, kv_rows)
    replace_weight(attention.o_proj, attention.o_proj.weight[:, query_rows])
    record_shapes(model)


def keep_channels(model: nn.Module, layer_index: int, channels: Sequence[int]) -> None:
    """Keep these MLP channels (rows of gate_proj and up_proj, columns of down_proj) of a layer and drop the rest.

    Raises:
        InputError: layer or channel out of range, a channel named twice, or no channel left.
    """
    mlp = _layer(model, layer_index).mlp
    rows = torch.tensor(_checked(channels, mlp.gate_proj.weight.shape[0], "channel", layer_index))
    _keep_rows(mlp.gate_proj, rows)
    _keep_rows(mlp.up_proj, rows)
    replace_weight(mlp.down_proj, mlp.down_proj.weight[:, rows])
    record_shapes(model)


def drop_attention(model: nn.Module, layer_index: int) -> None:
    """Remove the attention of a layer whole, output bias and norm included; its MLP stays.

    Raises:
        InputError: layer out of range or without attention, or the last one that has it.
    """
    layer, layers = _layer(model, layer_index), decoder_layers(model)
    attention_of(layer)
    if sum(map(has_attention, layers)) == 1:
        raise InputError(f"only layer {layer_index} has attention left: it must stay")
    remove_attention(layer)
    number_attentions(layers)
    record_shapes(model)


@contextmanager
def without_attention(layer: nn.Module) -> Iterator[None]:
    """Inside, a layer adds nothing but its MLP's output, as if `drop_attention` had taken the rest."""
    attention, norm = layer.self_attn, layer.input_layernorm
    remove_attention(layer)
    try:
        yield
    finally:
        layer.self_attn, layer.input_layernorm = attention, norm


def drop_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """Remove these decoder layers whole; those that are left are numbered anew, as the KV cache counts them.

    Raises:
        InputError: a layer out of range or named twice, or no layer with attention left.
    """
    decoder = model.get_decoder()
    gone, count = sorted(int(layer) for layer in layers), len(decoder.layers)
    for layer in gone:
        _layer(model, layer)
    if len(set(gone)) < len(gone):
        raise InputError(f"layers {gone} name one twice: name each once")
    if len(gone) == count:
        raise InputError(f"no layer would be left: keep at least one of the {count}")
    kept = [layer for index, layer in enumerate(decoder.layers) if index not in gone]
    if not any(map(has_attention, kept)):
        raise InputError(f"no layer with attention would be left without layers {gone}: keep one that has it")
    _put_layers(model, kept)


def take_layers(model: nn.Module, pruned: nn.Module) -> None:
    """Give a model the decoder layers of a pruned copy of it, which is not to be used any more."""
    layers = list(pruned.get_decoder().layers)
    for layer in filter(has_attention, layers):
        layer.self_attn.config = model.config  # one for all, so that `set_attn_implementation` reaches every layer
    _put_layers(model, layers)


@torch.no_grad()
def take_weights(model: nn.Module, module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a layer's attention or MLP the weights and biases of a cut one: its `state_dict`, of any size and
    precision."""
    for name, linear in module.named_children():
        if isinstance(linear, nn.Linear):
            replace_weight(linear, weights[f"{name}.weight"].to(linear.weight.device))
            if linear.bias is not None:
                _replace(linear, "bias", weights[f"{name}.bias"].to(linear.weight))
    record_shapes(model)


def _put_layers(model: nn.Module, layers: list[nn.Module]) -> None:
    model.get_decoder().layers = nn.ModuleList(layers)
    number_attentions(model.get_decoder().layers)
    model.config.per_layer_config = None  # entries beyond the new count would be refused
    model.config.num_hidden_layers = len(layers)
    record_shapes(model)


@torch.no_grad()
def add_output_bias(model: nn.Module, layer_index: int, projection: str, bias: torch.Tensor) -> None:
    """Add a vector [hidden] to the output of a layer's `o_proj` or `down_proj`, which gets a bias if it has none.

    Raises:
        InputError: layer out of range or without attention, another projection, or a bias that is not finite or not
        [hidden].
    """
    layer = _layer(model, layer_index)
    if projection not in ("o_proj", "down_proj"):
        raise InputError(f"{projection!r} cannot carry an output bias: use o_proj or down_proj")
    linear = attention_of(layer).o_proj if projection == "o_proj" else layer.mlp.down_proj
    if bias.shape != (linear.out_features,) or not torch.isfinite(bias).all():
        raise InputError(
            f"a bias of {projection} must be {linear.out_features} finite numbers, not {list(bias.shape)}: check it"
        )
    old = 0 if linear.bias is None else linear.bias
    total = (old + bias.to(linear.weight.device)).to(linear.weight.dtype)
    linear.bias = nn.Parameter(total, linear.weight.requires_grad)
    record_shapes(model)


def query_heads(groups: Sequence[int], group_size: int) -> list[int]:
    """The query heads of these groups: `repeat_kv` gives KV head g to the *consecutive* heads g·size …
    g·size+size−1."""
    return [group * group_size + i for group in groups for i in range(group_size)]


def rows_of_heads(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    """Row numbers of whole heads in a projection's weight, int64 [heads × head_dim]."""
    return (torch.tensor(heads, dtype=torch.long)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def record_shapes(model: nn.Module) -> None:
    """Write the layers' actual shapes and output biases into `config.per_layer_config`, so that what is saved can be
    loaded."""
    model.config.per_layer_config = {
        i: {**layer_shape(layer), **_biases(layer)} for i, layer in enumerate(decoder_layers(model))
    }


def _biases(layer: nn.Module) -> dict[str, bool]:
    return {
        "o_proj_bias": has_attention(layer) and layer.self_attn.o_proj.bias is not None,
        "down_proj_bias": layer.mlp.down_proj.bias is not None,
    }


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Inside, layers may be cut, dropped and given new weights and biases; if an exception leaves, all is as before.

    The originals wait in host memory. For a model on a CPU they are no copies, so weights must be replaced, not written
    into.
    """
    decoder, config = model.get_decoder(), dict(vars(model.config))
    layers = decoder.layers
    sizes = ("in_features", "out_features", "num_key_value_groups", "layer_idx")
    modules = [(m, {name: value for name, value in vars(m).items() if name in sizes}) for m in layers.modules()]
    children = [(m, dict(m._modules)) for m in layers.modules()]
    weights = [
        (module, name, None if p is None else (p.detach().cpu(), p.device, p.requires_grad))
        for module, _ in modules
        for name, p in module._parameters.items()
    ]
    try:
        yield
    except BaseException:
        decoder.layers = layers
        for module, attributes in modules:
            vars(module).update(attributes)
        for module, parts in children:
            module._modules.update(parts)
        for module, name, kept in weights:
            module._parameters[name] = None if kept is None else nn.Parameter(kept[0].to(kept[1]), kept[2])
        vars(model.config).clear()
        vars(model.config).update(config)
        raise


@torch.no_grad()
def replace_weight(linear: nn.Linear, weight: torch.Tensor) -> None:
    """Give a projection a new weight [out_features, in_features], of any size and precision; it keeps its dtype."""
    _replace(linear, "weight", weight.to(linear.weight.dtype))
    linear.out_features, linear.in_features = weight.shape


@torch.no_grad()
def mask_groups(model: nn.Module, layer_index: int, groups: Sequence[int]) -> None:
    """Zero the `o_proj` columns of these groups: what removing them must equal, with every shape left alone."""
    layer = _layer(model, layer_index)
    attention_of(layer).o_proj.weight[:, _query_rows(layer, groups)] = 0


def _query_rows(layer: nn.Module, groups: Sequence[int]) -> torch.Tensor:
    """Rows of q_proj and columns of o_proj that belong to these groups."""
    shape = layer_shape(layer)
    heads = query_heads(groups, shape["num_attention_heads"] // shape["num_key_value_heads"])
    return rows_of_heads(heads, layer.self_attn.head_dim)


def _layer(model: nn.Module, index: int) -> nn.Module:
    layers = decoder_layers(model)
    if not 0 <= index < len(layers):
        raise InputError(f"layer {index} is out of range: the model has layers 0 to {len(layers) - 1}")
    return layers[index]


def _checked(units: Sequence[int], count: int, kind: str, layer_index: int) -> list[int]:
    units = sorted(int(unit) for unit in units)
    if not units:
        raise InputError(f"no {kind} of layer {layer_index} would be left: keep at least one of its {count}")
    if units[0] < 0 or units[-1] >= count:
        wrong = units[0] if units[0] < 0 else units[-1]
        raise InputError(f"{kind} {wrong} is out of range: layer {layer_index} has {kind}s 0 to {count - 1}")
    if len(set(units)) < len(units):
        raise InputError(f"{kind}s {units} of layer {layer_index} name one twice: name each once")
    return units


def _keep_rows(linear: nn.Linear, rows: torch.Tensor) -> None:
    replace_weight(linear, linear.weight[rows])
    if linear.bias is not None:
        _replace(linear, "bias", linear.bias[rows])


def _replace(linear: nn.Linear, name: str, value: torch.Tensor) -> None:
    """A new Parameter, not a new `.data`: the old gradient and the old shape must not live on beside the new weight."""
    old = getattr(linear, name)
    setattr(linear, name, nn.Parameter(value.detach().clone().contiguous(), requires_grad=old.requires_grad))
